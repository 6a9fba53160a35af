// A KV head for AVX-512: its scores, and access to its packed rows.
#pragma once
#define QAQ_AVX512

#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "float_rows.h"
#include "head.h"
#include "key_mean.h"
#include "keys_avx512.h"
#include "layout.h"
#include "levels_avx512.h"
#include "runs_avx512.h"
#include "target.h"
#include "values_avx512.h"

QAQ_BEGIN_TARGET
namespace {

// Scratch memory of one thread, kept from call to call.
struct Scratch {
    Buffer<float> scores, by_row, tile, floats, coefficients, residual, packed, peaks, sums, masses, shifts;
    Levels levels;
    RowsByWidth widths;
    KeyScores keys;
    RowReader readers[2][QAQ_WIDTHS];
    WeightedValues values;
    KeyMeanScores means;
};

// A KV head with its scratch memory and what its rows need.
struct HeadRows : HeadOfLayer {
    Scratch& scratch;
    int packed_size, stride;  // of a query head's scores: those of packed tokens with padding, all
    Scales key_scales, value_scales;
    Layout key_layout, value_layout;

    // A query head's scores, later weights: of packed tokens, then of residual tokens.
    float* scores(int g) const { return scratch.scores.data() + int64_t(g) * stride; }
    float* residual_scores(int g) const { return scores(g) + packed_size; }
    int residual_tokens() const { return layer.sinks + layer.recent; }
    // The first packed token that the query sees, and the first residual token.
    int first_packed() const { return std::max(0, layer.first - layer.sinks); }
    int first_residual() const {
        return layer.first <= layer.sinks ? layer.first : std::max(layer.sinks, layer.first - layer.packed);
    }

    // The codec's offset of packed tokens from `begin` on, or null.
    const float* offset_of(const QaqSide& side, int begin) const {
        return side.offset ? side.offset + head * side.affine_head_stride + begin : nullptr;
    }

    // Unpacks a run of half precision to floats and calls visit(first row, n), a tile at a time.
    template <typename Visit>
    void each_half_tile(const Layout& layout, const WidthRun& run, Visit visit) const {
        alignas(64) float scales[2 * TILE];
        for (int i = 0; i < run.n; i += TILE) {
            const int n = std::min(TILE, run.n - i);
            std::copy_n(scratch.widths.scale(0) + run.begin + i, n, scales);
            std::copy_n(scratch.widths.scale(1) + run.begin + i, n, scales + TILE);
            unpack_halves(Tile{run.rows + int64_t(i) * layout.row_bytes(HALF), HALF, n, false, scales}, layout,
                          scratch.floats.data());
            visit(i, n);
        }
    }

    // Prepares for rows of a width, once for all blocks.
    void prepare(int side, int index) const {
        if (index == HALF || ready[side] >> index & 1) return;
        ready[side] |= 1 << index;
        RowReader& reader = scratch.readers[side][index];
        reader.prepare(side ? value_layout : key_layout, index, scratch.levels);
        if (!side) scratch.keys.of_width[index].quantize(*this, reader, key_layout, scratch.levels);
    }
    mutable int ready[2] = {};
};

}  // namespace
QAQ_END_TARGET
