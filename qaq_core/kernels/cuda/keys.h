// Scores of packed keys. A warp takes a tile: lane (n, q) decodes the octet 4i + q of the tokens 4n to 4n + 3 in its
// step i, which is a column of four products, one for each of these tokens.
//
// Rows of a product: [part of the row with its own scale][high and low halves of the query][4 heads].
#pragma once
#include "tile.h"

template <int DIM>
struct KeyStep {
    const Layout& layout;
    const Tile<DIM, 0>& tile;
    const uint4 *even, *odd;  // the query's dims in the step
    int at, token;            // the lane's octet, its first token
    float (&c)[4][4];

    template <int D>
    struct By {
        static QAQ_INLINE void run(KeyStep& it) {
            const Decoder<D, true> decode(it.layout, it.at);
            const auto planes =
                planes_of<D>(it.layout.units + static_cast<uint32_t>(8 * it.at), it.tile.base + it.token, it.tile.m, 0);
            uint32_t first[4], second[4];
            const uint4 even = read<uint4>(it.even), odd = read<uint4>(it.odd);
            decode.template operator()<0>(planes, first);
            decode.template operator()<1>(planes, second);
#pragma unroll
            for (int t = 0; t < 4; t++) multiply(it.c[t], even, first[t], second[t]);
            decode.template operator()<2>(planes, first);
            decode.template operator()<3>(planes, second);
#pragma unroll
            for (int t = 0; t < 4; t++) multiply(it.c[t], odd, first[t], second[t]);
        }
    };
};

// Adds to the scores [4] rows of STRIDE.
// Args: fragments: of the query, [DIM / 16, 32]. factors: what scores are multiplied with.
template <int DIM, int WARPS, int STRIDE, class Order>
QAQ_INLINE void score_keys(const Layout& layout, const Order& order, const unsigned long long* runs,
                           const uint4* fragments, const float* factors, float* scores) {
    const int lane = lane_index(), warp = thread_index() / 32, n = lane / 4, q = lane % 4;
    const bool low = n >= 4;
    float* row = scores + (n % 4) * STRIDE;
    const float factor = factors[n % 4];
    for (int index = warp; index < order.side[0].number; index += WARPS) {
        const Tile<DIM, 0> tile(order, runs, index);
        const int token = min(4 * n, tile.m - 4);
        float c[4][4] = {};
        const uint4* asked = fragments + lane;
#pragma unroll 1
        for (int i = 0; i < DIM / 32; i++, asked += 64) {
            const int deepest = tile.deepest(layout, i);
            KeyStep<DIM> step{layout, tile, asked, asked + 32, tile.octet(4 * i + q), token, c};
            by_planes<KeyStep<DIM>::template By>(deepest, step);
        }
        // Lanes of high halves keep one column, those of low halves the other: tokens 4·(2q + low) to that and 3.
        const int mine = 4 * (2 * q + low) < tile.m ? tile.begin + 4 * (2 * q + low) : Order::NOWHERE;
        const Four place = four_places(order.side[0].place + mine), meta = four_bytes(order.side[0].meta + mine);
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const float first = (low ? c[t][1] : c[t][0]) + across(low ? c[t][0] : c[t][1], 16);
            const float rest = (low ? c[t][3] : c[t][2]) + across(low ? c[t][2] : c[t][3], 16);
            const float2 scale = read<float2>(layout.scales + meta.x[t]);
            row[place.x[t]] += factor * (scale.x * first + scale.y * rest);
        }
    }
}
