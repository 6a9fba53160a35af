// One block of packed tokens of a KV head and four of its query heads: scores, softmax, weighted values.
#pragma once
#include "halves.h"
#include "keys.h"
#include "mean.h"
#include "softmax.h"
#include "values.h"

template <int DIM, int BLOCK, int WARPS>
struct Split {
    static constexpr int STRIDE = BLOCK + 8;  // one place for NOBODY
    static constexpr int DIMS = DIM < 128 ? DIM : 128;

    Order<BLOCK, WARPS> order;
    alignas(16) float scores[QUAD * STRIDE];
    float sums[WARPS * QUAD * DIMS];
    float peaks[WARPS][QUAD], masses[WARPS][QUAD];

    // Where this block of threads works: in shared memory, since registers are scarce.
    struct Here {
        long long mine, out;
        const unsigned long long* runs;
        int head, quad, first, begin, tokens;
    } here;

    QAQ_INLINE void run(const SplitArgs& args) {
        if (thread_index() == 0) find(args);
        __syncthreads();
        const Step& step = args.batch.steps[blockIdx.z];
        const Sequence& one = step.layers[args.batch.layer];
        if (here.tokens <= 0) {
            if (thread_index() < QUAD) args.norms[here.out + thread_index()] = make_float2(-INFINITY, 0.f);
            return;
        }
        order.sort(one, here.head, here.first, here.tokens);
        if (args.layout.angles && one.key_mean) {
            score_means<DIM, BLOCK, WARPS, STRIDE>(
                args.layout, args.turned + here.mine * DIM,
                args.layout.angles + static_cast<long long>(one.start + here.first) * DIM,
                args.factors + here.mine * 2 + QUAD, here.tokens, scores);
        } else {
            for (int i = thread_index(); i < QUAD * STRIDE; i += 32 * WARPS) scores[i] = 0.f;
        }
        __syncthreads();
        score_keys<DIM, WARPS, STRIDE>(args.layout, order, here.runs, args.fragments + here.mine * (DIM / 2),
                                       args.factors + here.mine * 2, scores);
        score_halves<DIM, WARPS, STRIDE>(args.layout, order, here.runs, args.framed + here.mine * DIM,
                                         args.factors + here.mine * 2, scores);
        __syncthreads();
        if (step.scores) watch(one, step, args.batch);
        if (here.begin > 0 || here.tokens < BLOCK) hide();
        if (thread_index() < QUAD) scores[thread_index() * STRIDE + BLOCK] = 0.f;  // the weight of NOBODY
        __syncthreads();
        weigh<BLOCK, WARPS, STRIDE>(scores, peaks, masses, args.norms + here.out);
#pragma unroll 1
        for (int part = 0; part < DIM; part += DIMS) {
            sum_values<DIM, DIMS, WARPS, STRIDE>(args.layout, order, here.runs, scores, part, sums);
            __syncthreads();
            for (int i = thread_index(); i < QUAD * DIMS; i += 32 * WARPS) {
                float sum = sum_halves<DIM>(args.layout, order, here.runs, scores + i / DIMS * STRIDE, part + i % DIMS);
                for (int w = 0; w < WARPS; w++) sum += sums[w * QUAD * DIMS + i];
                args.sums[(here.out + i / DIMS) * DIM + part + i % DIMS] = sum;
            }
            __syncthreads();
        }
    }

  private:
    QAQ_INLINE void find(const SplitArgs& args) {
        const Step& step = args.batch.steps[blockIdx.z];
        const Sequence& one = step.layers[args.batch.layer];
        here.head = blockIdx.y / args.batch.quads;
        here.quad = blockIdx.y % args.batch.quads;
        here.mine = (static_cast<long long>(blockIdx.z) * gridDim.y + blockIdx.y) * QUAD;
        here.out = here.mine * args.batch.splits + blockIdx.x * QUAD;
        here.runs = one.runs + (static_cast<long long>(here.head) * one.blocks + blockIdx.x) * 32;
        here.first = blockIdx.x * BLOCK;
        here.tokens = min(BLOCK, one.tokens - here.first);
        here.begin = max(0, first_seen(args.batch, one, step) - step.sinks - here.first);
    }
    // Tokens that are not in the window, or not there.
    QAQ_INLINE void hide() {
        for (int g = 0; g < QUAD; g++)
            for (int t = thread_index(); t < BLOCK; t += 32 * WARPS)
                if (t < here.begin || t >= here.tokens) scores[g * STRIDE + t] = -INFINITY;
    }
    QAQ_INLINE void watch(const Sequence& one, const Step& step, const Batch& batch) {
        const long long length = length_of(one, step);
        for (int g = 0; g < min(QUAD, batch.group - QUAD * here.quad); g++) {
            const long long row = here.head * batch.group + QUAD * here.quad + g;
            float* to = step.scores + row * length + step.sinks + here.first;
            for (int t = thread_index(); t < here.tokens; t += 32 * WARPS) to[t] = scores[g * STRIDE + t];
        }
        __syncthreads();
    }
};
