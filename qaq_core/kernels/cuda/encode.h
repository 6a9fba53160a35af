// The bytes of rows that are quantized: numbers over their scale, the codes of their cells, the planes that are wanted.
#pragma once
#include "structures.h"

struct EncodeArgs {
    const float* rows;       // [count, dim]
    const uint8_t* meta;     // [count]
    const uint8_t* have;     // [count] widths; HALF_BITS for half precision
    const uint8_t* want;     // [count]
    const long long* begin;  // [count] where a row's bytes begin in `out`
    uint8_t* out;
    const float* edges;     // [255] ascending; a code is how many are less than a number
    const float2* scales;   // [256] of a meta byte: of the first `split` octets, of the rest
    const uint8_t* places;  // [dim] 8 * octet + plane of each byte of a row
    int count, split;
};

constexpr int HALF_BITS = 32;

// A warp makes a row; lane l has the dims l, l + 32, ….
template <int DIM>
struct EncodeRows {
    static constexpr int WARPS = 4, EACH = DIM / 32;
    float edges[256];
    uint8_t codes[WARPS][DIM];

    QAQ_INLINE void run(const EncodeArgs& args) {
        const int tid = thread_index(), lane = tid & 31, warp = tid / 32;
        for (int i = tid; i < 256; i += 32 * WARPS) edges[i] = i < 255 ? args.edges[i] : INFINITY;
        __syncthreads();
        const long long row = static_cast<long long>(blockIdx.x) * WARPS + warp;
        if (row >= args.count) return;
        const int have = args.have[row] * (DIM / 16), want = args.want[row];
        const float2 scale = args.scales[args.meta[row]];
        const float* x = args.rows + row * DIM;
        uint8_t* out = args.out + args.begin[row];
        for (int dim = lane; dim < DIM; dim += 32) {
            const float number = x[dim] / (dim / 8 < args.split ? scale.x : scale.y);
            if (want == HALF_BITS) {
                const uint32_t bits = half2_of(number, 0.f);
                out[2 * dim] = static_cast<uint8_t>(bits);
                out[2 * dim + 1] = static_cast<uint8_t>(bits >> 8);
            } else {
                codes[warp][dim] = static_cast<uint8_t>(code(number));
            }
        }
        __syncwarp();
        if (want == HALF_BITS) return;
        for (int u = have + lane; u < want * (DIM / 16); u += 32) {
            const int place = args.places[u];
            uint32_t byte = 0;
            for (int j = 0; j < 8; j++) byte |= (codes[warp][(place & ~7) + j] >> (7 - place % 8) & 1u) << j;
            out[u - have] = static_cast<uint8_t>(byte);
        }
    }

  private:
    QAQ_INLINE int code(float x) const {
        int found = 0;
        for (int step = 128; step; step /= 2)
            if (!(edges[found + step - 1] >= x)) found += step;
        return found;
    }
};
