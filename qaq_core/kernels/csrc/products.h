// Products of small matrices of floats, whose results stay in registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

inline wide load_wide(const float* p) { return *reinterpret_cast<const wide_u*>(p); }
inline void store_wide(float* p, wide v) { *reinterpret_cast<wide_u*>(p) = v; }

// A matrix by its rows and steps, in elements.
struct Strided {
    const float* at;
    int64_t row, step;
};

// R rows of N vectors: c = c · scale + a · b, without c if there is no scale. b and c have rows of `stride` numbers.
template <int R, int N>
QAQ_NOINLINE void multiply_rows(Strided a, const float* b, int64_t stride, int depth, float* c, const float* scale) {
    wide sums[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            sums[r][n] = scale ? load_wide(c + r * stride + n * WIDE) * load_wide(scale + n * WIDE) : wide{};
    const float* from = a.at;
    for (int k = 0; k < depth; ++k, b += stride, from += a.step) {
        wide x[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) x[n] = load_wide(b + n * WIDE);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[r][n] += from[r * a.row] * x[n];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store_wide(c + r * stride + n * WIDE, sums[r][n]);
}

// The same for any number of rows.
template <int N>
inline void multiply(Strided a, int rows, const float* b, int64_t stride, int depth, float* c, const float* scale) {
    const auto take = [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (; rows >= R; rows -= R, a.at += R * a.row, c += R * stride)
            multiply_rows<R, N>(a, b, stride, depth, c, scale);
    };
#ifdef QAQ_AVX512
    take(std::integral_constant<int, 8>());
#endif
    take(std::integral_constant<int, 4>());
    take(std::integral_constant<int, 1>());
}

}  // namespace
QAQ_END_TARGET
