// The attention statistic of a layer, from the scores that the other kernels left.
#pragma once
#include "structures.h"

QAQ_INLINE void observe(const ObserveArgs& args) {
    const Batch& batch = args.batch;
    const Step& step = batch.steps[blockIdx.z];
    const Sequence& one = step.layers[batch.layer];
    const int length = length_of(one, step), position = int(blockIdx.x) * 256 + thread_index(), head = blockIdx.y;
    if (!step.scores || position >= length) return;
    const long long row = (static_cast<long long>(blockIdx.z) * batch.heads + head) * batch.group;
    const int first = first_seen(batch, one, step);
    float most = 0.f, sum = 0.f, squares = 0.f;
    for (int g = 0; g < batch.group; g++) {
        const float2 total = args.totals[row + g];
        const float score = step.scores[static_cast<long long>(head * batch.group + g) * length + position];
        const float p = position >= first ? quotient(__expf(score - total.x), total.y) : 0.f * total.y;
        most = fmaxf(most, p);
        sum += p;
        squares += p * p;
    }
    // A NaN is not greater than anything, but shows in the sum.
    step.statistic[static_cast<long long>(batch.layer * batch.heads + head) * length + position] =
        step.reduction == 1 ? most + 0.f * sum : squares / batch.group;
}
