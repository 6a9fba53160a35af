// What a layer does after the blocks of packed tokens: the exact tokens, all parts made one, the way back from packed
// values, their mean, the result in the model's type.
#pragma once
#include "turn.h"

template <int DIM>
struct Merge {
    static constexpr int THREADS = 128, EACH = DIM / 32;
    float packed[QUAD * DIM], restored[QUAD * DIM];

    // A running softmax of one head in a warp; lane l has the dims l, l + 32, ….
    struct Running {
        float peak, mass, sum[EACH];

        QAQ_INLINE Running() : peak(-INFINITY), mass(0.f), sum{} {}
        // Makes room for a score: what the new part is to be multiplied with.
        QAQ_INLINE float rise(float score) {
            const float higher = fmaxf(peak, score), base = higher == -INFINITY ? 0.f : higher;
            const float keep = __expf(peak - base);
            mass *= keep;
#pragma unroll
            for (int k = 0; k < EACH; k++) sum[k] *= keep;
            peak = higher;
            return __expf(score - base);
        }
    };

    QAQ_INLINE void run(const MergeArgs& args) {
        const Batch& batch = args.batch;
        const int head = blockIdx.x / batch.quads, quad = blockIdx.x % batch.quads, lane = lane_index();
        const int sequence = blockIdx.y, g = thread_index() / 32;
        const bool live = QUAD * quad + g < batch.group;
        const Step& step = batch.steps[sequence];
        const Sequence& one = step.layers[batch.layer];
        const long long mine = (static_cast<long long>(sequence) * gridDim.x + blockIdx.x) * QUAD + g;
        const long long row = (static_cast<long long>(sequence) * batch.heads + head) * batch.group + QUAD * quad + g;
        Running middle, exact;
        splits(args, one, mine, middle);
        exact_tokens(args, one, step, head, mine, live ? head * batch.group + QUAD * quad + g : -1, exact);
        const float top = fmaxf(middle.peak, exact.peak);
        const float packed_share = __expf(middle.peak - top), exact_share = __expf(exact.peak - top);
        const float total = middle.mass * packed_share + exact.mass * exact_share;
        Turned<DIM> back;
#pragma unroll
        for (int k = 0; k < EACH; k++) back.x[k] = middle.sum[k] * quotient(packed_share, total);
        if (one.tokens) back.output(one.turns[1], head);
#pragma unroll
        for (int k = 0; k < EACH; k++) packed[g * DIM + lane + 32 * k] = back.x[k];
        __syncthreads();
        const float* map = args.layout.output_map;
        times<DIM, THREADS>(map ? map + static_cast<long long>(head) * DIM * DIM : nullptr, packed, restored);
        __syncthreads();
        if (!live) return;
        const float weight = quotient(middle.mass * packed_share, total);
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int dim = lane + 32 * k;
            float out = exact.sum[k] * quotient(exact_share, total);
            if (one.tokens) out += restored[g * DIM + dim];
            if (one.tokens && one.value_mean) out += weight * one.value_mean[head * DIM + dim];
            put_number(args.out, row * DIM + dim, args.out_dtype, out);
        }
        if (lane) return;
        args.totals[row] = make_float2(top, total);
        if (step.log_sums) {
            const int query_head = head * batch.group + QUAD * quad + g;
            step.log_sums[static_cast<long long>(batch.layer) * batch.heads * batch.group + query_head] =
                top + logf(total);
        }
    }

  private:
    QAQ_INLINE void splits(const MergeArgs& args, const Sequence& one, long long mine, Running& all) {
        const int lane = lane_index(), splits = args.batch.splits;
        const float2* norms = args.norms + (mine / QUAD) * splits * QUAD + mine % QUAD;
        const float* sums = args.sums + ((mine / QUAD) * splits * QUAD + mine % QUAD) * DIM;
        for (int i = 0; i < one.blocks; i++) {
            const float2 norm = norms[i * QUAD];
            if (norm.x == -INFINITY && norm.y == 0.f) continue;  // nothing of it is in the window
            const float share = all.rise(norm.x);
            all.mass += norm.y * share;
#pragma unroll
            for (int k = 0; k < EACH; k++) all.sum[k] += share * sums[i * QUAD * DIM + lane + 32 * k];
        }
    }
    QAQ_INLINE void exact_tokens(const MergeArgs& args, const Sequence& one, const Step& step, int head, long long mine,
                                 int query_head, Running& all) {
        const int lane = lane_index(), dtype = args.batch.dtype;
        const float* asked = args.asked + mine * DIM;
        float x[EACH];
#pragma unroll
        for (int k = 0; k < EACH; k++) x[k] = asked[lane + 32 * k];
        const int first = first_seen(args.batch, one, step);
        for (int i = 0; i < step.exact_tokens; i++) {
            const int position = i < step.sinks ? i : i + one.tokens;
            if (position < first) continue;
            const long long at = static_cast<long long>(exact_place(step, i)) * DIM + lane;
            const long long key = head * one.exact_stride[0] + at, value = head * one.exact_stride[1] + at;
            float score = 0.f;
#pragma unroll
            for (int k = 0; k < EACH; k++) score += x[k] * number(one.exact[0], key + 32 * k, dtype);
            score = sum_of_warp(score);
            if (step.scores && query_head >= 0 && lane == 0)
                step.scores[query_head * static_cast<long long>(length_of(one, step)) + position] = score;
            const float share = all.rise(score);
            all.mass += share;
#pragma unroll
            for (int k = 0; k < EACH; k++) all.sum[k] += share * number(one.exact[1], value + 32 * k, dtype);
        }
    }
};
