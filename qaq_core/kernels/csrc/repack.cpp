#include "repack.h"

#include <cstring>

#include "checks.h"
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
    int64_t room[QAQ_WIDTHS];  // rows that still fit there
    int32_t refusal = 0;

    explicit Repacker(const QaqRepack& repack) : job(repack) {
        for (int w = 0; w < QAQ_WIDTHS; ++w) out[w] = job.rows[w], room[w] = job.room[w];
    }

    int64_t bytes(int w) const { return int64_t(job.half_bit) * HALF_BITS[w]; }

    bool refuse(int32_t why) {
        refusal = why;
        return false;
    }

    // Copies the rows of a width that were passed and stay.
    bool flush(int w) {
        if (const int64_t n = passed[w] - copied[w]; w && out[w] && n) {
            if (passed[w] > job.held_rows[w] || n > room[w]) return refuse(QAQ_SIZE);
            std::memcpy(out[w], job.held[w] + copied[w] * bytes(w), n * bytes(w));
            out[w] += n * bytes(w), room[w] -= n;
        }
        copied[w] = passed[w];
        return true;
    }

    // Writes a row of move i, whose first bytes are those of `row`.
    bool write(int64_t i, int want, const uint8_t* row, int64_t keep) {
        const int64_t rest = bytes(want) - keep;
        if (!out[want] || room[want] < 1) return refuse(QAQ_SIZE);
        if (rest < 0 || job.offsets[i] < 0 || job.offsets[i] > job.plane_bytes - rest) return refuse(QAQ_SIZE);
        if (keep) std::memcpy(out[want], row, keep);
        if (rest) std::memcpy(out[want] + keep, job.planes + job.offsets[i], rest);
        out[want] += bytes(want), --room[want];
        return true;
    }

    // Move i: the current token's row changes its width from `have` to `want`.
    bool move(int64_t i, int have, int want) {
        if (have > HALF || want > HALF) return refuse(QAQ_RANGE);
        const int64_t keep = want ? int64_t(job.keep[i]) * job.half_bit : 0;
        if (keep && (keep > bytes(have) || passed[have] >= job.held_rows[have])) return refuse(QAQ_SIZE);
        const uint8_t* row = keep ? job.held[have] + passed[have] * bytes(have) : nullptr;
        if (!flush(have)) return false;
        copied[have] = ++passed[have];  // dropped
        return want == 0 || (flush(want) && write(i, want, row, keep));
    }

    // Move i: a new row.
    bool add(int64_t i, int want) {
        if (want > HALF) return refuse(QAQ_RANGE);
        return want == 0 || (flush(want) && write(i, want, nullptr, 0));
    }

    int32_t run() {
        int64_t i = 0;
        for (int r = 0; r < job.heads; ++r) {
            const uint8_t *old = job.tags_before + r * job.before_stride, *now = job.tags_after + r * job.after_stride;
            const int64_t first = int64_t(r) * job.after;
            int t = 0;
            for (; i < job.moves && job.index[i] < first + job.before; ++i) {
                if (job.index[i] < first + t) return QAQ_RANGE;
                const int token = int(job.index[i] - first);
                count(old + t, token - t, job.shift, passed);
                if (!move(i, old[token] >> job.shift & 15, now[token] >> job.shift & 15)) return refusal;
                t = token + 1;
            }
            count(old + t, job.before - t, job.shift, passed);
            for (int64_t last = first + job.before - 1; i < job.moves && job.index[i] < first + job.after; ++i) {
                if (job.index[i] <= last) return QAQ_RANGE;
                last = job.index[i];
                if (!add(i, now[last - first] >> job.shift & 15)) return refusal;
            }
        }
        if (i < job.moves) return QAQ_RANGE;
        for (int w = 1; w < QAQ_WIDTHS; ++w)
            if (!flush(w)) return refusal;
        return 0;
    }
};

// The tags of each width in n tokens of all heads; `counts` [16].
void count_all(const uint8_t* tags, int64_t stride, int heads, int n, int shift, int64_t* counts) {
    for (int r = 0; r < heads; ++r) count(tags + r * stride, n, shift, counts);
}

// Whether rows are as many as tags say.
bool fits(const int64_t* counts, const uint8_t* const* held, const int64_t* rows) {
    for (int w = 1; w < QAQ_WIDTHS; ++w)
        if (counts[w] > rows[w] || (counts[w] && !held[w])) return false;
    return !counts[14] && !counts[15];
}

}  // namespace

int32_t qaq_count(const uint8_t* tags, int64_t stride, int32_t heads, int32_t n, int32_t shift, int64_t* counts) {
    if (heads < 0 || n < 0 || stride < 0) return QAQ_SIZE;
    if (heads && ((n && !tags) || !counts)) return QAQ_NULL;
    if (!is_shift(shift)) return QAQ_RANGE;
    for (int r = 0; r < heads; ++r) {
        int64_t found[16] = {};
        count(tags + r * stride, n, shift, found);
        if (found[14] || found[15]) return QAQ_RANGE;
        std::memcpy(counts + int64_t(r) * QAQ_WIDTHS, found, QAQ_WIDTHS * sizeof(int64_t));
    }
    return 0;
}

int32_t qaq_repack(const QaqRepack* job) {
    if (!job || any_null({job->held, job->held_rows, job->rows, job->room})) return QAQ_NULL;
    if (job->heads < 0 || job->before < 0 || job->after < job->before || job->half_bit < 1 || job->moves < 0 ||
        job->before_stride < 0 || job->after_stride < 0 || job->plane_bytes < 0)
        return QAQ_SIZE;
    if (!is_shift(job->shift)) return QAQ_RANGE;
    if (job->heads && ((job->before && !job->tags_before) || (job->after && !job->tags_after))) return QAQ_NULL;
    if (job->moves && (any_null({job->index, job->keep, job->offsets}) || (job->plane_bytes && !job->planes)))
        return QAQ_NULL;
    int64_t counts[16] = {};
    count_all(job->tags_before, job->before_stride, job->heads, job->before, job->shift, counts);
    return fits(counts, job->held, job->held_rows) ? Repacker(*job).run() : int32_t(QAQ_SIZE);
}

int32_t qaq_narrow(const QaqNarrow* job) {
    if (!job || any_null({job->held, job->held_rows, job->rows, job->room})) return QAQ_NULL;
    if (job->heads < 0 || job->tokens < 0 || job->half_bit < 1 || job->before_stride < 0 || job->after_stride < 0)
        return QAQ_SIZE;
    if (!is_shift(job->shift)) return QAQ_RANGE;
    if (job->heads && job->tokens && any_null({job->before, job->after})) return QAQ_NULL;
    int64_t had_before[16] = {}, has_after[16] = {};
    count_all(job->before, job->before_stride, job->heads, job->tokens, job->shift, had_before);
    count_all(job->after, job->after_stride, job->heads, job->tokens, job->shift, has_after);
    if (!fits(had_before, job->held, job->held_rows) || !fits(has_after, job->rows, job->room)) return QAQ_SIZE;
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
            if (has > had) return QAQ_RANGE;
            if (has) {
                std::memcpy(out[has], in[had], bytes[has]);
                out[has] += bytes[has];
            }
            if (had) in[had] += bytes[had];
        }
    }
    return 0;
}
