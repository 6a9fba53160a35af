// Packed rows: scores of keys against queries, and weighted sums of values.
//
// A row is a sequence of units, each one bit plane of one octet of dims (qaq_core/quantization/bit_planes.py). All rows
// of a width hold the same planes of every octet. With AVX2 products are made of codes (code_rows_avx2.h). Otherwise,
// and for rows in half precision, a tile is unpacked to floats first.
#pragma once

#include <cstdint>

#include "float_rows.h"
#include "layout.h"
#include "target.h"
#if defined(QAQ_AVX2)
#include "code_rows_avx2.h"
#else
#include "code_rows_generic.h"
#endif

QAQ_BEGIN_TARGET
namespace {

constexpr int OVERREAD = 15;  // bytes after a tile's last row that may be read with it

// sums[g * TILE + i]: the dot product of row i with query g, for the queries that `scratch` was prepared for.
void score_rows(const Layout& layout, const Tile& tile, int heads, const float* queries, int64_t step, float* sums,
                RowScratch& scratch) {
#ifdef QAQ_AVX2
    if (tile.index != HALF) return score_codes(layout, tile, sums, scratch);
#endif
    unpack(tile, layout, scratch.floats.data());
    four_at_a_time(heads, [&](int g, auto count) {
        dots<decltype(count)::value>(scratch.floats.data(), tile.n, 8 * layout.octets, queries + g * step, step,
                                     sums + g * TILE);
    });
}

// out[g * step + d] += the rows weighted by weights[g * TILE + i].
void weigh_rows(const Layout& layout, const Tile& tile, int heads, const float* weights, float* out, int64_t step,
                RowScratch& scratch) {
#ifdef QAQ_AVX2
    if (tile.index != HALF) return weigh_codes(layout, tile, heads, weights, out, step, scratch);
#endif
    unpack(tile, layout, scratch.floats.data());
    four_at_a_time(heads, [&](int g, auto count) {
        accumulate<decltype(count)::value>(scratch.floats.data(), tile.n, 8 * layout.octets, weights + g * TILE,
                                           out + g * step, step);
    });
}

}  // namespace
QAQ_END_TARGET
