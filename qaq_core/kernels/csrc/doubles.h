// Vectors of doubles, converted from and to floats.
#pragma once

#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

typedef double d4 __attribute__((vector_size(32)));
typedef double d4u __attribute__((vector_size(32), aligned(8), may_alias));

inline d4 widened(const double* p) { return *reinterpret_cast<const d4u*>(p); }
inline void store4(double* p, d4 v) { *reinterpret_cast<d4u*>(p) = v; }
inline d4 widened(const float* p) {
#ifdef QAQ_AVX2
    return (d4)_mm256_cvtps_pd(_mm_loadu_ps(p));  // of __builtin_convertvector, GCC 12 makes four instructions
#else
    return __builtin_convertvector(*reinterpret_cast<const f4u*>(p), d4);
#endif
}
inline void store_narrowed(float* p, d4 v) { *reinterpret_cast<f4u*>(p) = __builtin_convertvector(v, f4); }
// The sums of four vectors' elements.
inline d4 totals(const d4* v) {
#ifdef QAQ_AVX2
    const __m256d first = _mm256_hadd_pd((__m256d)v[0], (__m256d)v[1]);
    const __m256d last = _mm256_hadd_pd((__m256d)v[2], (__m256d)v[3]);
    return (d4)_mm256_permute2f128_pd(first, last, 0x20) + (d4)_mm256_permute2f128_pd(first, last, 0x31);
#else
    d4 out;
    for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    return out;
#endif
}
inline f4 rounded(d4 v) { return __builtin_convertvector(v, f4); }

}  // namespace
QAQ_END_TARGET
