// What centering took from the scores: q·RoPE(mean, t) = Σ cosine_i·cos(w_i t) + sine_i·sin(w_i t). Coefficients are
// turned to a tile's first position, and multiplied with the angles of 0 to NEAR - 1 positions on.
//
// Rows of a product: the halves of 4 heads' coefficients for one tile, then those for the next.
#pragma once
#include "structures.h"

// Args:
//   turned: cosine and sine coefficients [4, DIM]. angles: from the block's first position on.
//   scores: [4] rows of STRIDE, of which those behind the last token become anything.
template <int DIM, int BLOCK, int WARPS, int STRIDE>
QAQ_INLINE void score_means(const Layout& layout, const float* turned, const float* angles, const float* factors,
                            int tokens, float* scores) {
    constexpr int STEPS = DIM / 32;
    const int lane = lane_index(), warp = thread_index() / 32, n = lane / 4, q = lane % 4;
    const bool low = n >= 4;
    const float factor = factors[n % 4];
    float* row = scores + (n % 4) * STRIDE + 2 * q + low;
    for (int first = 2 * NEAR * warp; first < tokens; first += 2 * NEAR * WARPS) {
        float c[NEAR / 8][4] = {};
        const float* mine = turned + (n % 4) * DIM + 2 * q;
        const float* far[2] = {angles + first * DIM + 2 * q, angles + min(first + NEAR, tokens - 1) * DIM + 2 * q};
        const uint4* near = layout.near + lane;
#pragma unroll 1
        for (int k = 0; k < STEPS; k++) {
            uint32_t cosines[2][2], sines[2][2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 a = read<float2>(mine + 8 * r), b = read<float2>(mine + DIM / 2 + 8 * r);
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const float2 cos = read<float2>(far[tile] + 8 * r), sin = read<float2>(far[tile] + DIM / 2 + 8 * r);
                    const float p0 = a.x * cos.x + b.x * sin.x, p1 = a.y * cos.y + b.y * sin.y;
                    const float q0 = b.x * cos.x - a.x * sin.x, q1 = b.y * cos.y - a.y * sin.y;
                    cosines[tile][r] = halves_of(p0, p1, low);
                    sines[tile][r] = halves_of(q0, q1, low);
                }
            }
            mine += 16, far[0] += 16, far[1] += 16;
            const uint4 by_cosine = make_uint4(cosines[0][0], cosines[1][0], cosines[0][1], cosines[1][1]);
            const uint4 by_sine = make_uint4(sines[0][0], sines[1][0], sines[0][1], sines[1][1]);
#pragma unroll
            for (int j = 0; j < NEAR / 8; j++) {  // what halves lack of the angles comes after
                const uint4 cos = read<uint4>(near + j * 2 * STEPS * 32);
                const uint4 sin = read<uint4>(near + (j * 2 + 1) * STEPS * 32);
                multiply(c[j], by_cosine, cos.x, cos.y);
                multiply(c[j], by_sine, sin.x, sin.y);
                multiply(c[j], by_cosine, cos.z, cos.w);
                multiply(c[j], by_sine, sin.z, sin.w);
            }
            near += 32;
        }
        // Lanes of high halves keep one column, those of low halves the other.
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int j = 0; j < NEAR / 8; j++) {
                const float had = low ? c[j][2 * tile + 1] : c[j][2 * tile];
                const float sum = had + across(low ? c[j][2 * tile] : c[j][2 * tile + 1], 16);
                const int t = first + tile * NEAR + 8 * j;
                if (BLOCK >= 2 * NEAR * WARPS || t < BLOCK) row[t] = sum * factor;
            }
        }
    }
}
