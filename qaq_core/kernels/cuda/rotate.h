// A sequence's rotation of rows that are to be quantized: one reflection after the other, each rounded to floats, as in
// `Rotation.rows` of qaq_core. A product of a float and a whole number is exact in double precision.
#pragma once
#include "structures.h"

struct RotateArgs {
    float* rows;            // [runs, tokens, dim], in place; a run is a layer and head
    const int8_t* vectors;  // [runs, dim * (dim + 1) / 2 - 1]
    const float* before;    // [runs, dim / 8]
    const float* after;
    int tokens;
};

// A block of threads takes rows of one run, a warp several; lane l has the dims l, l + 32, ….
template <int DIM>
struct Rotate {
    static constexpr int WARPS = 4, ROWS = 4, EACH = DIM / 32;
    double squares[DIM];  // of the vectors

    QAQ_INLINE void run(const RotateArgs& args) {
        const int lane = lane_index(), warp = thread_index() / 32;
        const long long run = blockIdx.y;
        const int8_t* vectors = args.vectors + run * (DIM * (DIM + 1) / 2 - 1);
        for (int i = warp; i < DIM - 1; i += WARPS) {
            const int8_t* vector = vector_at(vectors, i);
            double sum = 0;
            for (int dim = lane; dim < DIM; dim += 32)
                if (dim >= i) sum += static_cast<double>(vector[dim]) * vector[dim];
            sum = sum_of_doubles(sum);
            if (lane == 0) squares[i] = sum > 1 ? sum : 1;
        }
        __syncthreads();
        const int first = (int(blockIdx.x) * WARPS + warp) * ROWS, count = min(ROWS, args.tokens - first);
        if (count <= 0) return;
        float* rows = args.rows + (run * args.tokens + first) * DIM;
        const float* before = args.before + run * (DIM / 8);
        const float* after = args.after + run * (DIM / 8);
        float x[ROWS][EACH];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int k = 0; k < EACH; k++) {
                const int dim = lane + 32 * k;
                x[r][k] = r < count ? rows[r * DIM + dim] * before[dim / 8] : 0.f;
            }
#pragma unroll 1
        for (int i = 0; i < DIM - 1; i++) reflect(vector_at(vectors, i), i, x);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int k = 0; k < EACH; k++) {
                const int dim = lane + 32 * k;
                if (r < count) rows[r * DIM + dim] = x[r][k] * after[dim / 8];
            }
    }

  private:
    // Where number `dim` of the i-th vector would be, which begins with dim i.
    QAQ_INLINE static const int8_t* vector_at(const int8_t* vectors, int i) {
        return vectors + i * DIM - i * (i - 1) / 2 - i;
    }
    QAQ_INLINE static double sum_of_doubles(double x) {
        for (int step = 16; step; step /= 2) x += across(x, step);
        return x;
    }
    QAQ_INLINE void reflect(const int8_t* vector, int i, float (&x)[ROWS][EACH]) const {
        double v[EACH];
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int dim = lane_index() + 32 * k;
            v[k] = dim >= i ? static_cast<double>(vector[dim]) : 0.;
        }
        const double square = squares[i];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            double dot = 0;
#pragma unroll
            for (int k = 0; k < EACH; k++) dot += x[r][k] * v[k];
            const double share = static_cast<float>(sum_of_doubles(dot) * 2 / square);
#pragma unroll
            for (int k = 0; k < EACH; k++) x[r][k] = static_cast<float>(x[r][k] - share * v[k]);
        }
    }
};
