#include "repack.h"

#include <cstring>

#include "widths.h"

namespace {

// Adds the number of times each nibble occurs to counts [16]. Four tables keep equal neighbours independent.
void count(const uint8_t* tags, int n, int shift, int64_t* counts) {
    uint32_t tables[4][16] = {};
    int t = 0;
    for (; t + 4 <= n; t += 4)
        for (int i = 0; i < 4; ++i) ++tables[i][tags[t + i] >> shift & 15];
    for (; t < n; ++t) ++tables[0][tags[t] >> shift & 15];
    for (int w = 0; w < 16; ++w) counts[w] += tables[0][w] + tables[1][w] + tables[2][w] + tables[3][w];
}

struct Repacker {
    const QaqRepack& job;
    int64_t passed[16] = {};   // rows of each width up to the current token
    int64_t copied[16] = {};   // of those, the rows that have been copied or dropped
    uint8_t* out[QAQ_WIDTHS];  // where the next row of each width goes

    explicit Repacker(const QaqRepack& repack) : job(repack) {
        for (int w = 0; w < QAQ_WIDTHS; ++w) out[w] = job.rows[w];
    }

    int64_t bytes(int w) const { return int64_t(job.half_bit) * HALF_BITS[w]; }

    // Copies the rows of a width that were passed and stay.
    void flush(int w) {
        if (const int64_t size = (passed[w] - copied[w]) * bytes(w); out[w] && size) {
            std::memcpy(out[w], job.held[w] + copied[w] * bytes(w), size);
            out[w] += size;
        }
        copied[w] = passed[w];
    }

    // Move i: the current token's row changes its width from `have` to `want`.
    void move(int64_t i, int have, int want) {
        const uint8_t* row = job.held[have] ? job.held[have] + passed[have] * bytes(have) : nullptr;
        flush(have);
        copied[have] = ++passed[have];  // dropped
        if (want == 0) return;
        flush(want);
        const int64_t keep = int64_t(job.keep[i]) * job.half_bit, rest = bytes(want) - keep;
        if (keep) std::memcpy(out[want], row, keep);
        if (rest) std::memcpy(out[want] + keep, job.planes + job.offsets[i], rest);
        out[want] += bytes(want);
    }

    // Move i: a new row.
    void add(int64_t i, int want) {
        flush(want);
        if (const int64_t size = bytes(want)) {
            std::memcpy(out[want], job.planes + job.offsets[i], size);
            out[want] += size;
        }
    }

    void run() {
        int64_t i = 0;
        for (int r = 0; r < job.heads; ++r) {
            const uint8_t *old = job.tags_before + r * job.before_stride, *now = job.tags_after + r * job.after_stride;
            const int64_t first = int64_t(r) * job.after;
            int t = 0;
            for (; i < job.moves && job.index[i] < first + job.before; ++i) {
                const int token = int(job.index[i] - first);
                count(old + t, token - t, job.shift, passed);
                move(i, old[token] >> job.shift & 15, now[token] >> job.shift & 15);
                t = token + 1;
            }
            count(old + t, job.before - t, job.shift, passed);
            for (; i < job.moves && job.index[i] < first + job.after; ++i)
                add(i, now[job.index[i] - first] >> job.shift & 15);
        }
        for (int w = 1; w < QAQ_WIDTHS; ++w) flush(w);
    }
};

}  // namespace

void qaq_count(const uint8_t* tags, int64_t stride, int32_t heads, int32_t n, int32_t shift, int64_t* counts) {
    for (int r = 0; r < heads; ++r) {
        int64_t found[16] = {};
        count(tags + r * stride, n, shift, found);
        std::memcpy(counts + int64_t(r) * QAQ_WIDTHS, found, QAQ_WIDTHS * sizeof(int64_t));
    }
}

void qaq_repack(const QaqRepack* job) { Repacker(*job).run(); }

void qaq_narrow(const QaqNarrow* job) {
    const uint8_t* in[QAQ_WIDTHS];
    uint8_t* out[QAQ_WIDTHS];
    int64_t bytes[QAQ_WIDTHS];
    for (int w = 0; w < QAQ_WIDTHS; ++w)
        in[w] = job->held[w], out[w] = job->rows[w], bytes[w] = int64_t(job->half_bit) * HALF_BITS[w];
    for (int r = 0; r < job->heads; ++r) {
        const uint8_t* before = job->before + r * job->before_stride;
        const uint8_t* after = job->after + r * job->after_stride;
        for (int t = 0; t < job->tokens; ++t) {
            const int had = before[t] >> job->shift & 15, has = after[t] >> job->shift & 15;
            if (has) std::memcpy(out[has], in[had], bytes[has]);
            out[has] += bytes[has];
            in[had] += bytes[had];
        }
    }
}
