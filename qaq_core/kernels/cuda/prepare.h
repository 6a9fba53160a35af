// What a layer does before attention: the queries as they meet packed keys, their products with the keys' means, and
// the new token's key and value among the exact ones.
#pragma once
#include "turn.h"

template <int DIM>
struct Prepare {
    static constexpr int THREADS = 128, OCTETS = DIM / 8;
    float asked[QUAD * DIM], framed[QUAD * DIM];

    QAQ_INLINE void run(const PrepareArgs& args) {
        const Batch& batch = args.batch;
        const int head = blockIdx.x / batch.quads, quad = blockIdx.x % batch.quads, tid = thread_index();
        const int sequence = blockIdx.y, heads = min(QUAD, batch.group - QUAD * quad);
        const Step& step = batch.steps[sequence];
        const Sequence& one = step.layers[batch.layer];
        const long long mine = static_cast<long long>(sequence) * gridDim.x + blockIdx.x;
        const long long first = (static_cast<long long>(sequence) * batch.heads + head) * batch.group + QUAD * quad;
        for (int i = tid; i < QUAD * DIM; i += THREADS) {
            asked[i] = i / DIM < heads ? number(args.query, first * DIM + i, args.dtype) * batch.scaling : 0.f;
            args.asked[mine * QUAD * DIM + i] = asked[i];
        }
        if (quad == 0 && step.new_place >= 0) add(args, one, step, head, sequence);
        __syncthreads();
        const float* map = args.layout.query_map;
        times<DIM, THREADS>(map ? map + static_cast<long long>(head) * DIM * DIM : nullptr, asked, framed);
        __syncthreads();
        turn(one, head, args.factors + mine * 2 * QUAD);
        if (args.layout.angles && one.key_mean) coefficients(one.key_mean + head * DIM, args, mine);
        __syncthreads();
        for (int i = tid; i < QUAD * DIM; i += THREADS) args.framed[mine * QUAD * DIM + i] = framed[i];
        for (int i = tid; i < OCTETS / 2 * 32; i += THREADS) args.fragments[mine * (OCTETS / 2) * 32 + i] = fragment(i);
    }

  private:
    QAQ_INLINE void add(const PrepareArgs& args, const Sequence& one, const Step& step, int head, int sequence) {
        const Batch& batch = args.batch;
        for (int i = thread_index(); i < SIDES * DIM; i += THREADS) {
            const int side = i / DIM, dim = i % DIM;
            const long long from = (static_cast<long long>(sequence) * batch.heads + head) * DIM + dim;
            const long long to = head * one.exact_stride[side] + static_cast<long long>(step.new_place) * DIM + dim;
            const float x = number(args.added[side], from, args.dtype);
            put_number(one.exact[side], to, batch.dtype, x);
            const long long kept =
                (static_cast<long long>(batch.layer * SIDES + side) * batch.heads + head) * DIM + dim;
            if (step.originals) put_number(step.originals, kept, args.dtype, x);
        }
    }
    // A warp's head through the rotation, and to a size that halves hold.
    QAQ_INLINE void turn(const Sequence& one, int head, float* factors) {
        const int lane = lane_index(), g = thread_index() / 32;
        Turned<DIM> vector;
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) vector.x[k] = framed[g * DIM + lane + 32 * k];
        vector.query(one.turns[0], head);
        float largest = 0.f;
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) largest = fmaxf(largest, fabsf(vector.x[k]));
        const float by = inverse_power(most_of_warp(largest));
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) framed[g * DIM + lane + 32 * k] = vector.x[k] * by;
        if (lane == 0) factors[g] = 1.f / by;
    }
    QAQ_INLINE void coefficients(const float* mean, const PrepareArgs& args, long long mine) {
        const int lane = lane_index(), g = thread_index() / 32;
        float cosine[DIM / 32], sine[DIM / 32], largest = 0.f;
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) {
            const int i = lane + 32 * k;
            cosine[k] = sine[k] = 0.f;
            if (i < DIM / 2) {
                const float q1 = asked[g * DIM + i], q2 = asked[g * DIM + DIM / 2 + i];
                cosine[k] = q1 * mean[i] + q2 * mean[DIM / 2 + i];
                sine[k] = q2 * mean[i] - q1 * mean[DIM / 2 + i];
                largest = fmaxf(largest, fmaxf(fabsf(cosine[k]), fabsf(sine[k])));
            }
        }
        const float by = inverse_power(most_of_warp(largest));
        float* to = args.turned + (mine * QUAD + g) * DIM;
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) {
            const int i = lane + 32 * k;
            if (i < DIM / 2) {
                to[i] = cosine[k] * by;
                to[DIM / 2 + i] = sine[k] * by;
            }
        }
        if (lane == 0) args.factors[mine * 2 * QUAD + QUAD + g] = 1.f / by;
    }
    // What lane `index` % 32 has of the query's dims in the product `index` / 32, see keys.h.
    QAQ_INLINE uint4 fragment(int index) const {
        const int lane = index % 32, n = lane / 4, q = lane % 4, product = index / 32;
        const int octet = 4 * (product / 2) + q;
        uint32_t parts[4];
        for (int r = 0; r < 4; r++) {
            const int dim = 8 * octet + 2 * (product % 2) + (r >> 1);
            const bool held = (octet < OCTETS / 4) == !(r & 1);
            const float* row = framed + (n % 4) * DIM;
            parts[r] = held ? halves_of(row[dim], row[dim + 4], n >= 4) : 0;
        }
        return make_uint4(parts[0], parts[1], parts[2], parts[3]);
    }
};
