// Scales and bytes of rows (encode.h), for every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "doubles.h"
#include "encode_kernels.h"
#include "half.h"
#include "target.h"
#include "vectors.h"
#include "widths.h"

QAQ_BEGIN_TARGET
namespace {

// The root mean square of a row's first dims.
float rms_of(const float* row, int dims) {
    d4 low = {}, high = {};
    for (int d = 0; d < dims; d += 8) {
        const d4 a = widened(row + d), b = widened(row + d + 4);
        low += a * a;
        high += b * b;
    }
    const d4 sums = low + high;
    return float(std::sqrt(((sums[0] + sums[1]) + (sums[2] + sums[3])) / dims));
}

void rms_rows(const QaqSpan& rows, int64_t begin, int64_t end, int dim, int split, float* out) {
    const int parts = split < dim ? 2 : 1;
    for (int64_t i = begin; i < end; ++i) {
        const float* row = static_cast<const float*>(rows.base) + offset_of(rows, i);
        out[i * parts] = rms_of(row, split);
        if (parts == 2) out[i * parts + 1] = rms_of(row + split, dim - split);
    }
}

// Codes of eight numbers: the number of edges below each. Edges in lower bins are below it and edges in higher bins are
// not; the one edge in its own bin is compared.
inline i8 codes_of(const QaqCells& cells, f8 x) {
    const f8 last = splat(float(cells.bins - 1)), zero = {};
    f8 bin = (x - cells.low) * cells.bins_per_unit;
    bin = bin < last ? bin : last;
    bin = bin > zero ? bin : zero;
#ifdef QAQ_AVX2
    const i8 below = (i8)_mm256_i32gather_epi32(cells.below, _mm256_cvttps_epi32((__m256)bin), 4);
    const f8 edge = (f8)_mm256_i32gather_ps(cells.edges, (__m256i)below, 4);
#else
    i8 below;
    f8 edge;
    for (int i = 0; i < 8; ++i) below[i] = cells.below[int(bin[i])], edge[i] = cells.edges[below[i]];
#endif
    return below - (i8)(x > edge);
}

// One plane of eight codes: bit j is code j's. Plane 0 is the most significant of 8 bits.
inline uint8_t plane_of(const int32_t* codes, int plane) {
#ifdef QAQ_AVX2
    const __m256i wide = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
    return uint8_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_sll_epi32(wide, _mm_cvtsi32_si128(24 + plane)))));
#else
    int bits = 0;
    for (int j = 0; j < 8; ++j) bits |= (codes[j] >> (7 - plane) & 1) << j;
    return uint8_t(bits);
#endif
}

// A row less its offset, divided by its scales.
struct ScaledRow {
    const float* row;
    f8 offset, first, rest;
    int split;

    f8 octet(int o) const { return (load(row + 8 * o) - offset) / (8 * o < split ? first : rest); }
};

void write_halves(const ScaledRow& scaled, int dim, uint8_t* out) {
    for (int o = 0; o < dim / 8; ++o) {
        const f8 octet = scaled.octet(o);
#ifdef QAQ_AVX2
        const __m128i halves = _mm256_cvtps_ph((__m256)octet, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * o), halves);
#else
        for (int j = 0; j < 8; ++j) {
            const uint16_t half = to_half(octet[j]);
            std::memcpy(out + 16 * o + 2 * j, &half, 2);
        }
#endif
    }
}

// Writes units first to last - 1 of a row.
void write_planes(const QaqCells& cells, const ScaledRow& scaled, int first, int last, uint8_t* out) {
    alignas(32) int32_t codes[MAX_DIM];
    uint8_t made[MAX_DIM / 8] = {};
    for (int k = first; k < last; ++k) {
        const int octet = int(cells.units[k] >> 3), plane = int(cells.units[k] & 7);
        if (!made[octet]) {
            *reinterpret_cast<i8*>(codes + 8 * octet) = codes_of(cells, scaled.octet(octet));
            made[octet] = 1;
        }
        *out++ = plane_of(codes + 8 * octet, plane);
    }
}

void encode_rows(const QaqEncode& job, int64_t begin, int64_t end) {
    const QaqCells& cells = job.cells;
    const int dim = cells.dim, parts = cells.split < dim ? 2 : 1;
    for (int64_t i = begin; i < end; ++i) {
        const float* row = static_cast<const float*>(job.rows.base) + offset_of(job.rows, i);
        const float* scale = job.scales + i * parts;
        const ScaledRow scaled{row, splat(job.offset ? job.offset[i] : 0.0f), splat(scale[0]), splat(scale[parts - 1]),
                               cells.split};
        uint8_t* out = job.out + job.begin[i];
        if (job.want[i] == HALF_BITS[HALF])
            write_halves(scaled, dim, out);
        else
            write_planes(cells, scaled, job.have[i] * dim / 16, std::min<int>(job.want[i], 16) * dim / 16, out);
    }
}

}  // namespace
QAQ_END_TARGET
