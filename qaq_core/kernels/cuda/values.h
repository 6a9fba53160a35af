// Weighted sums of packed values. A warp takes a tile: lane (n, q) decodes the octet 4i + n/2 of the tokens 8q to 8q +
// 7 in its step i, the dims 0, 1, 4, 5 of it or, with n odd, 2, 3, 6, 7. A column of a product is such a dim of eight
// octets' halves.
//
// Rows of a product: [part of the row with its own scale][high and low halves of the weight][4 heads].
#pragma once
#include "tile.h"

template <int DIM>
struct ValueStep {
    const Layout& layout;
    const Tile<DIM, 1>& tile;
    const uint4 (&weights)[2];
    int at, token, shift;  // the lane's octet, its first token, its first dim
    float (&c)[4][4];

    template <int D>
    struct By {
        static QAQ_INLINE void run(ValueStep& it) {
            const Decoder<D, false> decode(it.layout, it.at);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int token = min(it.token + 4 * j, it.tile.m - 4);
                const auto planes = planes_of<D>(it.layout.units + static_cast<uint32_t>(8 * it.at),
                                                 it.tile.base + token, it.tile.m, it.shift);
                uint32_t out[4];
                decode.template operator()<0>(planes, out);
                multiply(it.c[0], it.weights[j], out[0], out[1]);
                multiply(it.c[1], it.weights[j], out[2], out[3]);
                decode.template operator()<1>(planes, out);
                multiply(it.c[2], it.weights[j], out[0], out[1]);
                multiply(it.c[3], it.weights[j], out[2], out[3]);
            }
        }
    };
};

// Weighted sums of the values, of DIMS dims from FIRST on: into `sums` [WARPS, 4, DIMS], of each warp.
// Args: weights: [4] rows of STRIDE.
template <int DIM, int DIMS, int WARPS, int STRIDE, class Order>
QAQ_INLINE void sum_values(const Layout& layout, const Order& order, const unsigned long long* runs,
                           const float* weights, int first_dim, float* sums) {
    const int lane = lane_index(), warp = thread_index() / 32, n = lane / 4, q = lane % 4;
    const bool low = n >= 4;
    const float* row = weights + (n % 4) * STRIDE;
    float c[DIMS / 32][4][4] = {};
    for (int index = warp; index < order.side[1].number; index += WARPS) {
        const Tile<DIM, 1> tile(order, runs, index);
        uint4 weight[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int mine = 8 * q + 4 * j < tile.m ? tile.begin + 8 * q + 4 * j : Order::NOWHERE;
            const Four place = four_places(order.side[1].place + mine), meta = four_bytes(order.side[1].meta + mine);
            float x[4], y[4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const float2 scale = read<float2>(layout.scales + meta.x[t]);
                const float p = row[place.x[t]];
                x[t] = p * scale.x;
                y[t] = p * scale.y;
            }
            weight[j] = make_uint4(halves_of(x[0], x[1], low), halves_of(y[0], y[1], low), halves_of(x[2], x[3], low),
                                   halves_of(y[2], y[3], low));
        }
#pragma unroll
        for (int i = 0; i < DIMS / 32; i++) {
            const int deepest = tile.deepest(layout, first_dim / 32 + i), octet = first_dim / 8 + 4 * i + n / 2;
            ValueStep<DIM> step{layout, tile, weight, tile.octet(octet), 8 * q, 2 * (n & 1), c[i]};
            by_planes<ValueStep<DIM>::template By>(deepest, step);
        }
    }
#pragma unroll
    for (int i = 0; i < DIMS / 32; i++)
#pragma unroll
        for (int d = 0; d < 4; d++)
#pragma unroll
            for (int h = 0; h < 2; h++) {  // columns 2q and 2q + 1: both halves of the octet q
                const int octet = first_dim / 8 + 4 * i + q, dim = 8 * octet + 2 * h + d / 2 + 4 * (d % 2);
                float sum = octet < DIM / 32 ? c[i][d][h] : c[i][d][2 + h];
                sum += across(sum, 16);
                if (!low) sums[(warp * QUAD + n % 4) * DIMS + dim - first_dim] = sum;
            }
}
