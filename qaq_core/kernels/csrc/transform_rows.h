// What encode.h describes, written once and compiled once per instruction set, in a namespace of its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "doubles.h"
#include "encode_kernels.h"
#include "half.h"
#include "reflections.h"
#include "target.h"
#include "vectors.h"
#include "widths.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int TILE = 6;  // rows whose products are summed together
constexpr int FEW = 3;   // rows for which laying out the matrix does not pay

void read_original(const uint8_t* source, int32_t type, int dim, float* out) {
    if (type == QAQ_HALF)
        halves_to_floats(source, dim, out);
    else if (type == QAQ_BFLOAT16)
        bfloats_to_floats(source, dim, out);
    else
        std::memcpy(out, source, sizeof(float) * dim);
}

// RoPE of a mean. Each product is rounded to a float before the sum, as in separate operations: never fused with it.
void rotate(const float* mean, const float* angle, int dim, float* out) {
    const int half = dim / 2;
    for (int d = 0; d < half; d += 4) {
        const d4 first = widened(mean + d), second = widened(mean + half + d);
        const d4 cosine = widened(angle + d), sine = widened(angle + half + d);
        *reinterpret_cast<f4u*>(out + d) = rounded(first * cosine) - rounded(second * sine);
        *reinterpret_cast<f4u*>(out + half + d) = rounded(second * cosine) + rounded(first * sine);
    }
}

// out[r][o…] = Σ_d centered[r][d] · entries[d · stride…], of `rows` rows and `vectors` times 4 outputs.
template <int rows, int vectors, class Entry>
void multiply(const double* centered, const Entry* entries, int stride, int dim, const Transformed* transformed, int o) {
    d4 sums[rows][vectors] = {};
    for (int d = 0; d < dim; ++d, entries += stride) {
        d4 factors[vectors];
        for (int v = 0; v < vectors; ++v) factors[v] = widened(entries + 4 * v);
        for (int r = 0; r < rows; ++r) {
            const double x = centered[r * dim + d];
            const d4 wide = {x, x, x, x};
            for (int v = 0; v < vectors; ++v) sums[r][v] += wide * factors[v];
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v) store_narrowed(transformed[r].out + o + 4 * v, sums[r][v]);
}

// Of few rows: the matrix is read once, as it is.
void multiply_few(const double* centered, const float* matrix, int dim, const Transformed* transformed, int n) {
    for (int r = 0; r < n; ++r) {
        int o = 0;
        for (; o + 16 <= dim; o += 16) multiply<1, 4>(centered + r * dim, matrix + o, dim, dim, transformed + r, o);
        for (; o < dim; o += 8) multiply<1, 2>(centered + r * dim, matrix + o, dim, dim, transformed + r, o);
    }
}

// Of many: a panel of the matrix, 8 outputs wide, is laid out for all of them.
void multiply_many(const double* centered, const float* matrix, int dim, const Transformed* transformed, int n) {
    double panel[8 * MAX_DIM];
    for (int o = 0; o < dim; o += 8) {
        for (int d = 0; d < dim; ++d) {
            store4(panel + 8 * d, widened(matrix + int64_t(d) * dim + o));
            store4(panel + 8 * d + 4, widened(matrix + int64_t(d) * dim + o + 4));
        }
        int r = 0;
        for (; r + TILE <= n; r += TILE) multiply<TILE, 2>(centered + r * dim, panel, 8, dim, transformed + r, o);
        for (; r + 2 <= n; r += 2) multiply<2, 2>(centered + r * dim, panel, 8, dim, transformed + r, o);
        if (r < n) multiply<1, 2>(centered + r * dim, panel, 8, dim, transformed + r, o);
    }
}

// Originals less their center, in double precision. (On its own: inlined, compilers believe that `out` may stay empty.)
__attribute__((noinline)) void center(const QaqTransform& transform, int64_t place, int32_t type, const Transformed* transformed, int n, double* out) {
    float original[MAX_DIM], middle[MAX_DIM];
    const int dim = transform.dim;
    const float* mean = transform.means + place * dim;
    const float* angles = transform.angles ? transform.angles + transform.kind[place / transform.kv_heads] * transform.angles_stride : nullptr;
    std::memcpy(middle, mean, sizeof(float) * dim);
    for (int r = 0; r < n; ++r) {
        read_original(transformed[r].original, type, dim, original);
        if (angles) rotate(mean, angles + transformed[r].position * dim, dim, middle);
        for (int d = 0; d < dim; d += 8, out += 8) {
            store(original + d, load(original + d) - load(middle + d));
            store4(out, widened(original + d));
            store4(out + 4, widened(original + d + 4));
        }
    }
}

// Reflects one row: as with products above, nothing of it depends on the order of sums or on fused operations. Products
// of a float and a whole number are exact in double precision, and their sums all but exact.
void reflect_row(const double* vector, int square, int begin, int dim, float* row) {
    d4 low = {}, high = {};
    for (int d = begin; d < dim; d += 8) {
        low += widened(row + d) * widened(vector + d);
        high += widened(row + d + 4) * widened(vector + d + 4);
    }
    const d4 sums = low + high;
    const double share = float(((sums[0] + sums[1]) + (sums[2] + sums[3])) * 2 / square);
    for (int d = begin; d < dim; d += 4) store_narrowed(row + d, widened(row + d) - share * widened(vector + d));
}

// Rows of one head, turned to its axes; each reflection is rounded.
void turn_rows(const QaqRotation& rotation, int64_t place, int dim, const Transformed* transformed, int n) {
    double vector[MAX_DIM];
    const auto scale = [&](const float* factors) {
        factors += place * (dim / 8);
        for (int r = 0; r < n; ++r)
            for (int d = 0; d < dim; d += 8) store(transformed[r].out + d, load(transformed[r].out + d) * factors[d / 8]);
    };
    scale(rotation.before);
    const int8_t* numbers = rotation.reflections + place * numbers_of(dim);
    for (int first = 0; first < dim - 1; numbers += dim - first, ++first) {
        const int square = spread_vector(numbers, first, dim, vector);
        for (int r = 0; square && r < n; ++r) reflect_row(vector, square, first / 8 * 8, dim, transformed[r].out);
    }
    scale(rotation.after);
}

bool transform_rows(const QaqTransform& transform, int64_t place, int32_t type, const Transformed* transformed, int n) {
    double centered[CHUNK * MAX_DIM];
    center(transform, place, type, transformed, n, centered);
    const int dim = transform.dim;
    const float* matrix = transform.matrices + place * dim * dim;
    if (n <= FEW)
        multiply_few(centered, matrix, dim, transformed, n);
    else
        multiply_many(centered, matrix, dim, transformed, n);
    if (transform.rotation.reflections) turn_rows(transform.rotation, place, dim, transformed, n);
    f8 poison = {};  // a number less itself is 0, or not a number
    for (int r = 0; r < n; ++r)
        for (int d = 0; d < dim; d += 8) {
            const f8 row = load(transformed[r].out + d);
            poison += row - row;
        }
    return total(poison) == 0;
}

}  // namespace
QAQ_END_TARGET
