// Rows of floats: residual rows, and packed rows that have been unpacked.

// sums[g * TILE + i]: the dot product of row i with query g, for H queries, `step` floats apart. Two rows at a time
// share the loads of a query.
#pragma once

#include <cstdint>
#include <type_traits>

#include "half.h"
#include "layout.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

template <int H>
void dots(const float* rows, int n, int dim, const float* queries, int64_t step, float* sums) {
    for (int first = 0; first < n; first += 8) {
        f8 parts[H][8];
        for (int i = 0; i < 8; i += 2) {
            f8 one[H] = {}, two[H] = {};
            if (first + i < n) {
                const float *a = rows + (first + i) * dim, *b = first + i + 1 < n ? a + dim : a;
                for (int d = 0; d < dim; d += 8) {
                    const f8 x = load(a + d), y = load(b + d);
                    for (int g = 0; g < H; ++g) {
                        const f8 q = load(queries + g * step + d);
                        one[g] += q * x;
                        two[g] += q * y;
                    }
                }
            }
            for (int g = 0; g < H; ++g) parts[g][i] = one[g], parts[g][i + 1] = two[g];
        }
        for (int g = 0; g < H; ++g) store(sums + g * TILE + first, totals(parts[g]));
    }
}

// out[g] += the rows weighted by weights[g * TILE + i], for H outputs, `step` floats apart.
template <int H>
void accumulate(const float* rows, int n, int dim, const float* weights, float* out, int64_t step) {
    for (int d = 0; d < dim; d += 16) {
        f8 one[H], two[H];
        for (int g = 0; g < H; ++g) one[g] = load(out + g * step + d), two[g] = load(out + g * step + d + 8);
        for (int i = 0; i < n; ++i) {
            const f8 x = load(rows + i * dim + d), y = load(rows + i * dim + d + 8);
            for (int g = 0; g < H; ++g) {
                const f8 w = splat(weights[g * TILE + i]);
                one[g] += w * x;
                two[g] += w * y;
            }
        }
        for (int g = 0; g < H; ++g) store(out + g * step + d, one[g]), store(out + g * step + d + 8, two[g]);
    }
}

// Rows in half precision, times their scales.
inline void unpack_halves(const Tile& tile, const Layout& layout, float* out) {
    const int dim = 8 * layout.octets;
    for (int i = 0; i < tile.n; ++i) {
        float* row = out + i * dim;
        halves_to_floats(tile.rows + int64_t(2) * i * dim, dim, row);
        for (int d = 0; d < dim; ++d) row[d] *= tile.scales[(d < 8 * layout.split ? 0 : TILE) + i];
    }
}

// Calls visit(first head, count) for groups of up to four heads; the count is a compile-time constant.
template <typename Visit>
inline void four_at_a_time(int heads, Visit visit) {
    int g = 0;
    for (; heads - g >= 4; g += 4) visit(g, std::integral_constant<int, 4>());
    if (heads - g == 1) visit(g, std::integral_constant<int, 1>());
    if (heads - g == 2) visit(g, std::integral_constant<int, 2>());
    if (heads - g == 3) visit(g, std::integral_constant<int, 3>());
}

}  // namespace
QAQ_END_TARGET
