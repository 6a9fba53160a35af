// What queries and outputs meet on their way to and from packed rows: a rotation's reflections (Householder), the
// scales of octets, a matrix of the head.
//
// Rows were made as y = L·U·R·x, so queries become L⁻¹·U·R⁻¹·q, and sums of values R⁻¹·Uᵀ·L⁻¹·y.
#pragma once
#include "structures.h"

// A warp turns one vector; lane l has the dims l, l + 32, ….
template <int DIM>
struct Turned {
    static constexpr int EACH = DIM / 32;
    float x[EACH];

    QAQ_INLINE void query(const Turn& turn, int head) {
        if (!turn.vectors) return;
        divide(turn.before + head * (DIM / 8));
#pragma unroll 1
        for (int i = 0; i < DIM - 1; i++) reflect(turn, head, i);
        divide(turn.after + head * (DIM / 8));
    }
    QAQ_INLINE void output(const Turn& turn, int head) {
        if (!turn.vectors) return;
        divide(turn.after + head * (DIM / 8));
#pragma unroll 1
        for (int i = DIM - 2; i >= 0; i--) reflect(turn, head, i);
        divide(turn.before + head * (DIM / 8));
    }

  private:
    QAQ_INLINE void divide(const float* scales) {
#pragma unroll
        for (int k = 0; k < EACH; k++) x[k] = quotient(x[k], scales[(lane_index() + 32 * k) / 8]);
    }
    // Reflection i leaves the first i dims unchanged.
    QAQ_INLINE void reflect(const Turn& turn, int head, int i) {
        const long long all = DIM * (DIM + 1) / 2 - 1;
        const int8_t* vector = turn.vectors + head * all + i * DIM - i * (i - 1) / 2 - i;
        float v[EACH], dot = 0.f;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int dim = lane_index() + 32 * k;
            v[k] = dim >= i ? static_cast<float>(vector[dim]) : 0.f;
            dot += v[k] * x[k];
        }
        dot = sum_of_warp(dot) * turn.factors[head * (DIM - 1) + i];
#pragma unroll
        for (int k = 0; k < EACH; k++) x[k] -= dot * v[k];
    }
};

// Four vectors [4, DIM] times a matrix [DIM, DIM] from the right; a thread makes a column. `to` may not be `from`.
template <int DIM, int THREADS>
QAQ_INLINE void times(const float* matrix, const float* from, float* to) {
    for (int column = thread_index(); column < DIM; column += THREADS) {
        float sum[QUAD] = {};
        if (!matrix) {
            for (int g = 0; g < QUAD; g++) sum[g] = from[g * DIM + column];
        } else {
#pragma unroll 4
            for (int i = 0; i < DIM; i++) {
                const float one = read<float>(matrix + i * DIM + column);
#pragma unroll
                for (int g = 0; g < QUAD; g++) sum[g] += from[g * DIM + i] * one;
            }
        }
#pragma unroll
        for (int g = 0; g < QUAD; g++) to[g * DIM + column] = sum[g];
    }
}
