// Results equal torch's bit for bit, so no product may be fused with a sum.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "step_error.h"

#include "checks.h"

int64_t qaq_step_error(const QaqStepError* job) {
    if (!job) return QAQ_NULL;
    if (!is_count(job->heads) || !is_count(job->tokens) || job->observed_stride < 0 || job->tags_stride < 0 ||
        job->meta_stride < 0 || job->room < 0)
        return QAQ_SIZE;
    if (!job->total || (job->room && any_null({job->index, job->error}))) return QAQ_NULL;
    *job->total = 0.0;
    if (!job->heads || !job->tokens) return 0;
    if (any_null(
            {job->observed, job->factors, job->tags, job->key_meta, job->value_meta, job->key_lost, job->value_lost}))
        return QAQ_NULL;
    int64_t found = 0;
    for (int head = 0; head < job->heads; ++head) {
        const float factor = job->factors[head], *observed = job->observed + head * job->observed_stride;
        const uint8_t *tags = job->tags + head * job->tags_stride, *keys = job->key_meta + head * job->meta_stride,
                      *values = job->value_meta + head * job->meta_stride;
        const float *key_lost = job->key_lost + int64_t(head) * 256 * QAQ_WIDTHS,
                    *value_lost = job->value_lost + int64_t(head) * 256 * QAQ_WIDTHS;
        for (int t = 0; t < job->tokens; ++t) {
            const float felt = observed[t] * factor;
            if (!(felt > job->negligible)) continue;
            const int key = tags[t] & 15, value = tags[t] >> 4;
            if (key >= QAQ_WIDTHS || value >= QAQ_WIDTHS) return QAQ_RANGE;
            const float error =
                felt * (key_lost[keys[t] * QAQ_WIDTHS + key] + value_lost[values[t] * QAQ_WIDTHS + value]);
            *job->total += error;
            if (!(error > job->least)) continue;
            if (found < job->room) {
                job->index[found] = int64_t(head) * job->tokens + t;
                job->error[found] = error;
            }
            ++found;
        }
    }
    return found;
}
