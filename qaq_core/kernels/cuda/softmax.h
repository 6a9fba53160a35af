// The softmax of a block's scores.
#pragma once
#include "structures.h"

// Scores [4] rows of STRIDE become weights, e to the power of what they are above the row's peak.
template <int BLOCK, int WARPS, int STRIDE>
QAQ_INLINE void weigh(float* scores, float (&peaks)[WARPS][QUAD], float (&masses)[WARPS][QUAD], float2* norms) {
    const int tid = thread_index(), lane = lane_index(), warp = tid / 32;
    for (int g = 0; g < QUAD; g++) {
        float peak = -INFINITY;
        for (int t = 4 * tid; t < BLOCK; t += 128 * WARPS) {
            const float4 four = *reinterpret_cast<const float4*>(scores + g * STRIDE + t);
            peak = fmaxf(fmaxf(peak, fmaxf(four.x, four.y)), fmaxf(four.z, four.w));
        }
        peak = most_of_warp(peak);
        if (lane == 0) peaks[warp][g] = peak;
    }
    __syncthreads();
    for (int g = 0; g < QUAD; g++) {
        float peak = peaks[0][g], mass = 0.f;
        for (int w = 1; w < WARPS; w++) peak = fmaxf(peak, peaks[w][g]);
        const float base = peak == -INFINITY ? 0.f : peak;
        for (int t = 4 * tid; t < BLOCK; t += 128 * WARPS) {
            auto* at = reinterpret_cast<float4*>(scores + g * STRIDE + t);
            float4 four = *at;
            four = make_float4(power_of_e(four.x - base), power_of_e(four.y - base), power_of_e(four.z - base),
                               power_of_e(four.w - base));
            *at = four;
            mass += (four.x + four.y) + (four.z + four.w);
        }
        mass = sum_of_warp(mass);
        if (lane == 0) masses[warp][g] = mass;
        if (tid == 0) norms[g].x = peak;
    }
    __syncthreads();
    if (tid < QUAD) {
        float mass = 0.f;
        for (int w = 0; w < WARPS; w++) mass += masses[w][tid];
        norms[tid].y = mass;
    }
}
