// Rows in half precision: rare, and so no tiles. They stand one after the other.
#pragma once
#include "order.h"

template <int DIM, int SIDE>
struct Halves {
    const Layout& layout;
    const uint16_t* rows;
    const uint16_t* place;  // of each row
    const uint8_t* meta;
    int count;

    template <class Order>
    QAQ_INLINE Halves(const Layout& layout, const Order& order, const unsigned long long* runs)
        : layout(layout), rows(reinterpret_cast<const uint16_t*>(runs[16 * SIDE + HALF_WIDTH])) {
        const auto& side = order.side[SIDE];
        place = side.place + side.begin[HALF_WIDTH];
        meta = side.meta + side.begin[HALF_WIDTH];
        count = side.count[HALF_WIDTH];
    }
    QAQ_INLINE float at(int row, int dim) const {
        const float2 scale = read<float2>(layout.scales + meta[row]);
        return floats_of(read<uint16_t>(rows + row * DIM + dim)).x * (dim < DIM / 4 ? scale.x : scale.y);
    }
};

// Adds to the scores [4] rows of STRIDE; a warp takes a row. Args: framed: the query [4, DIM].
template <int DIM, int WARPS, int STRIDE, class Order>
QAQ_INLINE void score_halves(const Layout& layout, const Order& order, const unsigned long long* runs,
                             const float* framed, const float* factors, float* scores) {
    const Halves<DIM, 0> keys(layout, order, runs);
#pragma unroll 1
    for (int row = thread_index() / 32; row < keys.count; row += WARPS) {
        float sum[QUAD] = {};
#pragma unroll 1
        for (int dim = lane_index(); dim < DIM; dim += 32) {
            const float x = keys.at(row, dim);
#pragma unroll
            for (int g = 0; g < QUAD; g++) sum[g] += x * framed[g * DIM + dim];
        }
#pragma unroll
        for (int g = 0; g < QUAD; g++) {
            sum[g] = sum_of_warp(sum[g]);
            if (lane_index() == g) scores[g * STRIDE + keys.place[row]] += factors[g] * sum[g];
        }
    }
}

// One dim of the weighted sum of values. Args: weights: of one head.
template <int DIM, class Order>
QAQ_INLINE float sum_halves(const Layout& layout, const Order& order, const unsigned long long* runs,
                            const float* weights, int dim) {
    const Halves<DIM, 1> values(layout, order, runs);
    float sum = 0.f;
#pragma unroll 1
    for (int row = 0; row < values.count; row++) sum += weights[values.place[row]] * values.at(row, dim);
    return sum;
}
