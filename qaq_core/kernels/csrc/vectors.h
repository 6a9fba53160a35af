// Vectors of floats, for every instruction set.
#pragma once

#include <cstdint>

#include "target.h"

QAQ_BEGIN_TARGET
namespace {

typedef float f8 __attribute__((vector_size(32)));
typedef float f8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef float f4 __attribute__((vector_size(16)));
typedef float f4u __attribute__((vector_size(16), aligned(4), may_alias));

#ifdef QAQ_AVX512
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
typedef float wide __attribute__((vector_size(4 * WIDE)));  // one register
typedef float wide_u __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

inline f8 load(const float* p) { return *reinterpret_cast<const f8u*>(p); }
inline void store(float* p, f8 v) { *reinterpret_cast<f8u*>(p) = v; }
inline f8 splat(float x) { return f8{x, x, x, x, x, x, x, x}; }

inline void store4(float* p, f4 v) { *reinterpret_cast<f4u*>(p) = v; }
inline f4 load4(const float* p) { return *reinterpret_cast<const f4u*>(p); }

// The sum of a vector's elements.
inline float total(f8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// The sums of eight vectors' elements.
inline f8 totals(const f8* v) {
#ifdef QAQ_AVX2
    auto pair = [&](int i) { return _mm256_hadd_ps((__m256)v[i], (__m256)v[i + 1]); };
    __m256 low = _mm256_hadd_ps(pair(0), pair(2)), high = _mm256_hadd_ps(pair(4), pair(6));
    return (f8)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
    f8 out;
    for (int i = 0; i < 8; ++i) out[i] = total(v[i]);
    return out;
#endif
}

#ifdef QAQ_AVX512
inline f8 totals(const wide* v) {
    f8 halves[8];
    for (int i = 0; i < 8; ++i)
        halves[i] = (f8)_mm512_castps512_ps256((__m512)v[i]) + (f8)_mm512_extractf32x8_ps((__m512)v[i], 1);
    return totals(halves);
}
#endif

// e^x for x <= 0, with a relative error below 2e-7.
inline f8 exp8(f8 x) {
    f8 lowest = splat(-87.0f), shifter = splat(12582912.0f);
    x = x < lowest ? lowest : x;  // keeps NaN
    f8 shifted = x * 1.44269504f + shifter, n = shifted - shifter;
    f8 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i8 power = ((i8)shifted - 0x4B400000 + 127) << 23;
    return p * (f8)power;
}

#ifdef QAQ_AVX512
inline __m512 exp16(__m512 x) {
    const __m512 shifter = _mm512_set1_ps(12582912.0f);
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // keeps NaN
    const __m512 n = x * 1.44269504f + shifter - shifter;
    const __m512 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    __m512 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return _mm512_scalef_ps(p, n);
}
#endif

}  // namespace
QAQ_END_TARGET
