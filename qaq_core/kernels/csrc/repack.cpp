#include "repack.h"

#include <cstring>

#include "widths.h"

namespace {

// Adds how often each nibble occurs to counts [16]. Four tables, so that equal neighbours do not wait for each other.
void count(const uint8_t* tags, int n, int shift, int64_t* counts) {
    uint32_t tables[4][16] = {};
    int t = 0;
    for (; t + 4 <= n; t += 4)
        for (int i = 0; i < 4; ++i) ++tables[i][tags[t + i] >> shift & 15];
    for (; t < n; ++t) ++tables[0][tags[t] >> shift & 15];
    for (int w = 0; w < 16; ++w) counts[w] += tables[0][w] + tables[1][w] + tables[2][w] + tables[3][w];
}

struct Weaver {
    const QaqRepack& job;
    int64_t observed[16] = {};     // rows held of each width up to the present token
    int64_t copied[16] = {};   // of those, how many have been copied or left out
    uint8_t* out[QAQ_WIDTHS];  // where each width's next row goes

    explicit Weaver(const QaqRepack& repack) : job(repack) {
        for (int w = 0; w < QAQ_WIDTHS; ++w) out[w] = job.rows[w];
    }

    int64_t bytes(int w) const { return int64_t(job.half_bit) * HALF_BITS[w]; }

    // Copies the rows of a width that have been passed and stay.
    void flush(int w) {
        if (const int64_t size = (observed[w] - copied[w]) * bytes(w); out[w] && size) {
            std::memcpy(out[w], job.held[w] + copied[w] * bytes(w), size);
            out[w] += size;
        }
        copied[w] = observed[w];
    }

    // The i-th move: the present token's row, of width `have` before (or none) and `want` from now on.
    void move(int64_t i, int have, int want) {
        const uint8_t* row = job.held[have] ? job.held[have] + observed[have] * bytes(have) : nullptr;
        flush(have);
        copied[have] = ++observed[have];  // left out
        if (want == 0) return;
        flush(want);
        const int64_t keep = int64_t(job.keep[i]) * job.half_bit, rest = bytes(want) - keep;
        if (keep) std::memcpy(out[want], row, keep);
        if (rest) std::memcpy(out[want] + keep, job.planes + job.offsets[i], rest);
        out[want] += bytes(want);
    }

    // A row that comes.
    void add(int64_t i, int want) {
        flush(want);
        if (const int64_t size = bytes(want)) {
            std::memcpy(out[want], job.planes + job.offsets[i], size);
            out[want] += size;
        }
    }

    void run() {
        int64_t i = 0;
        for (int r = 0; r < job.runs; ++r) {
            const uint8_t *old = job.tags_before + r * job.before_stride, *now = job.tags_after + r * job.after_stride;
            const int64_t first = int64_t(r) * job.after;
            int t = 0;
            for (; i < job.moves && job.index[i] < first + job.before; ++i) {
                const int token = int(job.index[i] - first);
                count(old + t, token - t, job.shift, observed);
                move(i, old[token] >> job.shift & 15, now[token] >> job.shift & 15);
                t = token + 1;
            }
            count(old + t, job.before - t, job.shift, observed);
            for (; i < job.moves && job.index[i] < first + job.after; ++i)
                add(i, now[job.index[i] - first] >> job.shift & 15);
        }
        for (int w = 1; w < QAQ_WIDTHS; ++w) flush(w);
    }
};

}  // namespace

void qaq_count(const uint8_t* tags, int64_t stride, int32_t runs, int32_t n, int32_t shift, int64_t* counts) {
    for (int r = 0; r < runs; ++r) {
        int64_t found[16] = {};
        count(tags + r * stride, n, shift, found);
        std::memcpy(counts + int64_t(r) * QAQ_WIDTHS, found, QAQ_WIDTHS * sizeof(int64_t));
    }
}

void qaq_repack(const QaqRepack* repack) { Weaver(*repack).run(); }

void qaq_narrow(const QaqNarrow* narrow) {
    const uint8_t* in[QAQ_WIDTHS];
    uint8_t* out[QAQ_WIDTHS];
    int64_t bytes[QAQ_WIDTHS];
    for (int w = 0; w < QAQ_WIDTHS; ++w)
        in[w] = narrow->held[w], out[w] = narrow->rows[w], bytes[w] = int64_t(narrow->half_bit) * HALF_BITS[w];
    for (int r = 0; r < narrow->runs; ++r) {
        const uint8_t* before = narrow->before + r * narrow->before_stride;
        const uint8_t* after = narrow->after + r * narrow->after_stride;
        for (int t = 0; t < narrow->tokens; ++t) {
            const int had = before[t] >> narrow->shift & 15, has = after[t] >> narrow->shift & 15;
            if (has) std::memcpy(out[has], in[had], bytes[has]);
            out[has] += bytes[has];
            in[had] += bytes[had];
        }
    }
}
