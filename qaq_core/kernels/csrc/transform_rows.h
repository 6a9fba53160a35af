// A linear transform of originals (encode.h), for every instruction set.
#pragma once

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

constexpr int ROW_TILE = 6;  // rows whose products are summed together
constexpr int FEW_ROWS = 3;  // up to this many rows, copying the matrix to panels does not pay

// RoPE of a mean. Each product is rounded to a float before the sum, as in separate operations; it is never fused.
void apply_rope(const float* mean, const float* angle, int dim, float* out) {
    const int half = dim / 2;
    for (int d = 0; d < half; d += 4) {
        const d4 first = widened(mean + d), second = widened(mean + half + d);
        const d4 cosine = widened(angle + d), sine = widened(angle + half + d);
        *reinterpret_cast<f4u*>(out + d) = rounded(first * cosine) - rounded(second * sine);
        *reinterpret_cast<f4u*>(out + half + d) = rounded(second * cosine) + rounded(first * sine);
    }
}

// rows[r].out[o…] = Σ_d centered[r][d] · entries[d · stride…], of N rows and 4·V outputs.
template <int N, int V, class Entry>
void multiply(const double* centered, const Entry* entries, int stride, int dim, const RowToMake* rows, int o) {
    d4 sums[N][V] = {};
    for (int d = 0; d < dim; ++d, entries += stride) {
        d4 factors[V];
        for (int v = 0; v < V; ++v) factors[v] = widened(entries + 4 * v);
        for (int r = 0; r < N; ++r) {
            const double x = centered[r * dim + d];
            const d4 wide = {x, x, x, x};
            for (int v = 0; v < V; ++v) sums[r][v] += wide * factors[v];
        }
    }
    for (int r = 0; r < N; ++r)
        for (int v = 0; v < V; ++v) store_narrowed(rows[r].out + o + 4 * v, sums[r][v]);
}

// For few rows: the matrix is read in place.
void multiply_few(const double* centered, const float* matrix, int dim, const RowToMake* rows, int n) {
    for (int r = 0; r < n; ++r) {
        int o = 0;
        for (; o + 16 <= dim; o += 16) multiply<1, 4>(centered + r * dim, matrix + o, dim, dim, rows + r, o);
        for (; o < dim; o += 8) multiply<1, 2>(centered + r * dim, matrix + o, dim, dim, rows + r, o);
    }
}

// For many rows: a panel of the matrix, 8 outputs wide, is copied and used by all of them.
void multiply_many(const double* centered, const float* matrix, int dim, const RowToMake* rows, int n) {
    double panel[8 * MAX_DIM];
    for (int o = 0; o < dim; o += 8) {
        for (int d = 0; d < dim; ++d) {
            store4(panel + 8 * d, widened(matrix + int64_t(d) * dim + o));
            store4(panel + 8 * d + 4, widened(matrix + int64_t(d) * dim + o + 4));
        }
        int r = 0;
        for (; r + ROW_TILE <= n; r += ROW_TILE) multiply<ROW_TILE, 2>(centered + r * dim, panel, 8, dim, rows + r, o);
        for (; r + 2 <= n; r += 2) multiply<2, 2>(centered + r * dim, panel, 8, dim, rows + r, o);
        if (r < n) multiply<1, 2>(centered + r * dim, panel, 8, dim, rows + r, o);
    }
}

// Originals less their means, in double precision. Not inlined: there, compilers warn that `out` may be uninitialized.
QAQ_NOINLINE void center(const QaqTransform& transform, int64_t place, int32_t type, const RowToMake* rows, int n,
                         double* out) {
    float original[MAX_DIM], middle[MAX_DIM];
    const int dim = transform.dim;
    const float* mean = transform.means + place * dim;
    const float* angles = transform.angles
                              ? transform.angles + transform.kind[place / transform.kv_heads] * transform.angles_stride
                              : nullptr;
    std::memcpy(middle, mean, sizeof(float) * dim);
    for (int r = 0; r < n; ++r) {
        to_floats(type, rows[r].original, dim, original);
        if (angles) apply_rope(mean, angles + rows[r].position * dim, dim, middle);
        for (int d = 0; d < dim; d += 8, out += 8) {
            store(original + d, load(original + d) - load(middle + d));
            store4(out, widened(original + d));
            store4(out + 4, widened(original + d + 4));
        }
    }
}

// Reflects up to four rows side by side: the sums of one alone wait for each other. As above, the result does not
// depend on fused operations: a product of a float and a small integer is exact in double precision.
template <int R>
void reflect_rows(const double* vector, int square, int begin, int dim, const RowToMake* rows) {
    d4 low[R] = {}, high[R] = {};
    for (int d = begin; d < dim; d += 8) {
        const d4 first = widened(vector + d), second = widened(vector + d + 4);
        for (int r = 0; r < R; ++r) {
            low[r] += widened(rows[r].out + d) * first;
            high[r] += widened(rows[r].out + d + 4) * second;
        }
    }
    d4 sums[4] = {};
    for (int r = 0; r < R; ++r) sums[r] = low[r] + high[r];
    float share[4];
    store_narrowed(share, totals(sums) * 2 / double(square));
    for (int d = begin; d < dim; d += 4) {
        const d4 numbers = widened(vector + d);
        for (int r = 0; r < R; ++r)
            store_narrowed(rows[r].out + d, widened(rows[r].out + d) - double(share[r]) * numbers);
    }
}

// Applies a head's rotation to its rows. The result of each reflection is rounded to floats.
void rotate_rows(const QaqRotation& rotation, int64_t place, int dim, const RowToMake* rows, int n) {
    double vector[MAX_DIM];
    const auto scale = [&](const float* factors) {
        factors += place * (dim / 8);
        for (int r = 0; r < n; ++r)
            for (int d = 0; d < dim; d += 8) store(rows[r].out + d, load(rows[r].out + d) * factors[d / 8]);
    };
    scale(rotation.before);
    const int8_t* numbers = rotation.reflections + place * entries_of(dim);
    for (int first = 0; first < dim - 1; numbers += dim - first, ++first) {
        const int square = expand_vector(numbers, first, dim, vector);
        const int begin = first / 8 * 8;
        int r = square ? 0 : n;
        for (; r + 4 <= n; r += 4) reflect_rows<4>(vector, square, begin, dim, rows + r);
        for (; r < n; ++r) reflect_rows<1>(vector, square, begin, dim, rows + r);
    }
    scale(rotation.after);
}

// Transforms up to ROW_CHUNK rows of one layer and head. Returns whether all are finite.
bool transform_rows(const QaqTransform& transform, int64_t place, int32_t type, const RowToMake* rows, int n) {
    double centered[ROW_CHUNK * MAX_DIM];
    center(transform, place, type, rows, n, centered);
    const int dim = transform.dim;
    const float* matrix = transform.matrices + place * dim * dim;
    if (n <= FEW_ROWS)
        multiply_few(centered, matrix, dim, rows, n);
    else
        multiply_many(centered, matrix, dim, rows, n);
    if (transform.rotation.reflections) rotate_rows(transform.rotation, place, dim, rows, n);
    f8 not_finite = {};  // x - x is 0 or NaN
    for (int r = 0; r < n; ++r)
        for (int d = 0; d < dim; d += 8) {
            const f8 row = load(rows[r].out + d);
            not_finite += row - row;
        }
    return total(not_finite) == 0;
}

}  // namespace
QAQ_END_TARGET
