// Numbers of a QaqType as floats, and floats as half precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "interface.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

inline float from_half(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + 0x38000000);
    } else {
        float small = float(rest) * 0x1p-24f;
        std::memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void halves_to_floats(const uint8_t* source, int dim, float* out) {
#ifdef QAQ_AVX2
    for (int d = 0; d < dim; d += 8)
        _mm256_storeu_ps(out + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 2 * d))));
#else
    for (int d = 0; d < dim; ++d) {
        uint16_t half;
        std::memcpy(&half, source + 2 * d, 2);
        out[d] = from_half(half);
    }
#endif
}

inline void bfloats_to_floats(const uint8_t* source, int dim, float* out) {
    for (int d = 0; d < dim; ++d) {
        uint16_t high;
        std::memcpy(&high, source + 2 * d, 2);
        uint32_t bits = uint32_t(high) << 16;
        std::memcpy(out + d, &bits, 4);
    }
}

inline int bytes_of(int32_t type) { return type == QAQ_FLOAT ? 4 : 2; }

// Numbers of a QaqType as floats.
inline void to_floats(int32_t type, const uint8_t* source, int dim, float* out) {
    if (type == QAQ_HALF) halves_to_floats(source, dim, out);
    if (type == QAQ_BFLOAT16) bfloats_to_floats(source, dim, out);
    if (type == QAQ_FLOAT) std::memcpy(out, source, dim * 4);
}

// Rounds to nearest, ties to even.
inline uint16_t to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(x) * 0x1p24f)));
    return uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

void floats_to_halves(const float* source, int dim, uint8_t* out) {
#ifdef QAQ_AVX2
    for (int d = 0; d < dim; d += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * d),
                         _mm256_cvtps_ph(_mm256_loadu_ps(source + d), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int d = 0; d < dim; ++d) {
        const uint16_t half = to_half(source[d]);
        std::memcpy(out + 2 * d, &half, 2);
    }
#endif
}

}  // namespace
QAQ_END_TARGET
