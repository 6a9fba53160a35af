// Results equal torch's bit for bit, so no product may be fused with a sum.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "allocate.h"

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "widths.h"

namespace {

// The number of thresholds, which ascend, below a benefit: the index of the width it earns.
int steps_below(const float* thresholds, float benefit) {
    int steps = 0;
    for (int step = 0; step < QAQ_STEPS; ++step) steps += benefit > thresholds[step];
    return steps;
}

int32_t refusal_of(const QaqSideRows& rows) {
    if (rows.heads < 0 || rows.count < 0 || rows.meta_stride < 0 || rows.tags_stride < 0) return QAQ_SIZE;
    const bool any = rows.heads && rows.count;
    if (any && any_null({rows.weight, rows.meta, rows.thresholds})) return QAQ_NULL;
    return is_shift(rows.shift) ? 0 : QAQ_RANGE;
}

}  // namespace

int32_t qaq_update_statistic(const QaqStatisticUpdate* job) {
    if (!job) return QAQ_NULL;
    if (job->heads < 0 || job->tokens < 0 || job->state_stride < 0) return QAQ_SIZE;
    if (job->heads && job->tokens && any_null({job->state, job->importance, job->observed})) return QAQ_NULL;
    const float lowest = std::exp2(job->log2_floor);
    uint64_t index = uint64_t(job->seed);
    for (int head = 0; head < job->heads; ++head) {
        uint8_t* state = job->state + head * job->state_stride;
        const float* observed = job->observed + int64_t(head) * job->tokens;
        for (int t = 0; t < job->tokens; ++t) {
            const float before = job->importance[state[t]], now = before - (before - observed[t]) * (1.0f - job->keep);
            const float code = (std::log2(std::min(std::max(now, lowest), 1.0f)) - job->log2_floor) / job->step;
            const float dither = float((index++ * 2654435769u) >> 16 & 0xffff) / 65536.0f;
            state[t] = uint8_t(std::min(int(code + dither), 255));
        }
    }
    return 0;
}

int32_t qaq_weigh(const QaqWeigh* job) {
    if (!job) return QAQ_NULL;
    if (job->heads < 0 || job->tokens < 0 || job->first < 0 || job->count < 0 || job->sinks < 0 || job->reach < 0 ||
        job->first > job->tokens - job->count || job->state_stride < 0)
        return QAQ_SIZE;
    if (any_null({job->importance, job->sums}) || (job->heads && job->tokens && any_null({job->state, job->smooth})) ||
        (job->heads && job->count && !job->weight))
        return QAQ_NULL;
    const int tokens = job->tokens, reach = job->reach;
    double* sums = job->sums;
    float* smooth = job->smooth;
    for (int head = 0; head < job->heads; ++head) {
        const uint8_t* state = job->state + head * job->state_stride;
        const auto importance = [&](int t) { return t < job->sinks ? 0.0f : job->importance[state[t]]; };
        sums[0] = 0.0;
        for (int t = 0; t < tokens; ++t) sums[t + 1] = sums[t] + importance(t);
        double total = 0.0;
        for (int t = 0; t < tokens; ++t) {
            const int begin = std::max(0, t - reach), end = t + 1;
            const float before = float((sums[end] - sums[begin]) / (end - begin));
            smooth[t] = importance(t) * job->own + before * job->before;
            total += smooth[t];
        }
        const float factor = 1.0f / std::max(float(total / tokens), 1e-30f) * job->share;
        float* weight = job->weight + int64_t(head) * job->count;
        for (int t = 0; t < job->count; ++t) weight[t] = smooth[job->first + t] * factor + job->floor;
    }
    return 0;
}

int32_t qaq_widths(const QaqSideRows* rows, float factor, uint8_t* widths) {
    if (!rows) return QAQ_NULL;
    if (const int32_t refusal = refusal_of(*rows)) return refusal;
    if (rows->heads && rows->count && !widths) return QAQ_NULL;
    for (int head = 0; head < rows->heads; ++head) {
        const float* thresholds = rows->thresholds + int64_t(head) * 256 * QAQ_STEPS;
        const uint8_t* meta = rows->meta + head * rows->meta_stride;
        const int64_t first = int64_t(head) * rows->count;
        for (int t = 0; t < rows->count; ++t)
            widths[first + t] =
                HALF_BITS[steps_below(thresholds + meta[t] * QAQ_STEPS, rows->weight[first + t] * factor)];
    }
    return 0;
}

int64_t qaq_width_changes(const QaqSideRows* rows, float upper, float target, float lower, int64_t* index,
                          uint8_t* held, uint8_t* wanted) {
    if (!rows) return QAQ_NULL;
    if (const int32_t refusal = refusal_of(*rows)) return refusal;
    if (rows->heads && rows->count && any_null({rows->tags, index, held, wanted})) return QAQ_NULL;
    int64_t found = 0;
    const bool narrow = upper == upper;
    for (int head = 0; head < rows->heads; ++head) {
        const float* thresholds = rows->thresholds + int64_t(head) * 256 * QAQ_STEPS;
        const uint8_t *meta = rows->meta + head * rows->meta_stride, *tags = rows->tags + head * rows->tags_stride;
        const int64_t first = int64_t(head) * rows->count;
        for (int t = 0; t < rows->count; ++t) {
            const float* steps = thresholds + meta[t] * QAQ_STEPS;
            const float weight = rows->weight[first + t];
            const int width = tags[t] >> rows->shift & 15;
            // An index beyond QAQ_STEPS is half precision, wider than any codes.
            const bool up = width < QAQ_STEPS && weight * lower > steps[width];
            const bool down = narrow && width > 0 && (width > QAQ_STEPS || !(weight * upper > steps[width - 1]));
            if (!up && !down) continue;
            if (width > HALF) return QAQ_RANGE;
            index[found] = first + t;
            held[found] = HALF_BITS[width];
            wanted[found++] = HALF_BITS[steps_below(steps, weight * target)];
        }
    }
    return found;
}
