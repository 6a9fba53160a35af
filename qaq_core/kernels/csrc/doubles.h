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
inline f4 rounded(d4 v) { return __builtin_convertvector(v, f4); }

}  // namespace
QAQ_END_TARGET
