// The operation for AVX-512: for each KV head scores of all tokens, the softmax, weighted values, a block at a time.
// A query head's scores stand together: those of packed tokens, then of exact ones.
#pragma once
#define QAQ_AVX512

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>

#include "buffer.h"
#include "float_rows.h"
#include "head.h"
#include "key_mean.h"
#include "keys_avx512.h"
#include "levels_avx512.h"
#include "runs_avx512.h"
#include "target.h"
#include "values_avx512.h"

QAQ_BEGIN_TARGET
namespace {

struct Scratch {  // one per thread, kept from call to call
    Buffer<float> scores, lines, tile, floats, coefficients, residual, packed, peaks, sums, masses, shifts;
    Levels levels;
    Widths widths;
    Keys keys;
    Reading readings[2][QAQ_WIDTHS];
    Values values;
    MeanScores means;
};

struct Head : HeadOfLayer {
    Scratch& scratch;
    int held, stride;  // numbers of the scores that are of packed tokens; of all, of a query head
    Scales key_scales, value_scales;
    Layout key_layout, value_layout;

    float* scores(int g) const { return scratch.scores.data() + int64_t(g) * stride; }
    float* exact_scores(int g) const { return scores(g) + held; }
    int exact_tokens() const { return layer.sinks + layer.recent; }
    // First packed, and first exact token that the query sees.
    int first_packed() const { return std::max(0, layer.first - layer.sinks); }
    int first_exact() const {
        return layer.first <= layer.sinks ? layer.first : std::max(layer.sinks, layer.first - layer.packed);
    }

    // The codec's offset of packed tokens from `begin` on, or null.
    const float* offset_of(const QaqSide& side, int begin) const {
        return side.offset ? side.offset + head * side.affine_head_stride + begin : nullptr;
    }

    // -- scores ----------------------------------------------------------------------------------------------------

    // What packed tokens of a block score before their rows are counted; up to SPAN more are written.
    void score_means(int begin, int n) const {
        for (int g = 0; g < layer.group; g += 4)
            for (int t = begin; t < begin + n; t += SPAN)
                scratch.means.span(layer.start + t, scratch.coefficients.data() + g * layer.dim,
                                   std::min(4, layer.group - g), scores(g) + t, stride);
    }

    // A width's rows in half precision: floats, a tile at a time.
    template <typename Visit>
    void each_half_tile(const Layout& layout, const Run& run, Visit visit) const {
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

    void dot(const float* rows, int n, const float* queries, int g, int heads) const {
        four_at_a_time(heads, [&](int h, auto count) {
            dots<decltype(count)::value>(rows, n, layer.dim, queries + h * layer.stride, layer.stride,
                                         scratch.tile.data() + (g + h) * TILE);
        });
    }

    void score_rows(const Run& run, int line) const {
        const Widths& widths = scratch.widths;
        float* lines = scratch.lines.data() + run.begin;
        if (run.index == HALF) {
            each_half_tile(key_layout, run, [&](int i, int n) {
                dot(scratch.floats.data(), n, transformed(0), 0, layer.group);
                for (int g = 0; g < layer.group; ++g)
                    std::copy_n(scratch.tile.data() + g * TILE, n, lines + int64_t(g) * line + i);
            });
            return;
        }
        scratch.keys.score(scratch.readings[0][run.index], scratch.levels, run, widths.scale(0) + run.begin,
                                      widths.scale(1) + run.begin, lines, line);
    }

    void score_block(int block, int begin) const {
        const int n = std::min(layer.block_tokens, layer.packed - begin);
        Widths& widths = scratch.widths;
        widths.sort(*this, 0, key_layout, key_scales, block, begin, n);
        room(scratch.lines, size_t(layer.group) * widths.line + TILE);
        if (layer.key_mean) score_means(begin, n);
        for (int i = 0; i < widths.count; ++i) {
            prepare(0, widths.runs[i].index);
            score_rows(widths.runs[i], widths.line);
        }
        four_at_a_time(layer.group, [&](int g, auto heads) { place_scores<decltype(heads)::value>(g, begin, n); });
    }

    // Brings the scores of H heads from the order of rows to that of positions, and adds what is not in rows.
    template <int H>
    QAQ_NOINLINE void place_scores(int g, int begin, int n) const {
        const Widths& widths = scratch.widths;
        const float* lines = scratch.lines.data() + int64_t(g) * widths.line;
        const float* offset = offset_of(layer.key, begin);
        const bool has_means = layer.key_mean;
        float* to = scores(g) + begin;
        __m512 peaks[H], numbers[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) peaks[h] = _mm512_set1_ps(scratch.peaks[g + h]);
        for (int t = 0; t < n; t += 16) {
            const __mmask16 there = first_of_16(n - t), observed = there & ~first_of_16(first_packed() - begin - t);
            widths.expand<H>(lines, widths.line, t, numbers);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                float* at = to + int64_t(h) * stride + t;
                if (has_means) numbers[h] += load16(at);
                if (offset) numbers[h] += _mm512_maskz_loadu_ps(there, offset + t) * scratch.shifts[g + h];
                store16(at, numbers[h]);
                peaks[h] = _mm512_mask_max_ps(peaks[h], observed, numbers[h], peaks[h]);
            }
        }
        for (int h = 0; h < H; ++h) scratch.peaks[g + h] = _mm512_reduce_max_ps(peaks[h]);
    }

    // Gets ready for a width, once for all blocks.
    void prepare(int side, int index) const {
        if (index == HALF || ready[side] >> index & 1) return;
        ready[side] |= 1 << index;
        Reading& reading = scratch.readings[side][index];
        reading.prepare(side ? value_layout : key_layout, index, scratch.levels);
        if (!side) scratch.keys.of_width[index].take(*this, reading, key_layout, scratch.levels);
    }
    mutable int ready[2] = {};

    void score() const {
        const int group = layer.group, dim = layer.dim;
        std::fill_n(scratch.peaks.data(), group, -std::numeric_limits<float>::infinity());
        each_residual_tile(layer.key, scratch.floats.data(), [&](int at, int n) {
            dot(scratch.floats.data(), n, query(0), 0, group);
            const int to = at < layer.sinks ? at : at - layer.packed;
            for (int g = 0; g < group; ++g) std::copy_n(scratch.tile.data() + g * TILE, n, exact_scores(g) + to);
        });
        for (int g = 0; g < group; ++g)
            for (int t = first_exact(); t < exact_tokens(); ++t)
                scratch.peaks[g] = std::max(scratch.peaks[g], exact_scores(g)[t]);
        if (!layer.packed) return;
        if (layer.key_mean) {
            scratch.means.prepare(layer.angles, dim);
            for (int g = 0; g < group; ++g)
                scratch.means.pose(query(g), layer.key_mean + head * dim, scratch.coefficients.data() + g * dim);
        }
        for (int g = 0; g < group; ++g)
            scratch.shifts[g] = layer.key.offset ? std::accumulate(transformed(g), transformed(g) + dim, 0.0f) : 0.0f;
        each_block([&](int block, int begin) { score_block(block, begin); });
    }

    // -- values ----------------------------------------------------------------------------------------------------

    void weigh_rows(const Run& run, int line) const {
        const Widths& widths = scratch.widths;
        const float* lines = scratch.lines.data() + run.begin;
        if (run.index == HALF) {
            each_half_tile(value_layout, run, [&](int i, int n) {
                for (int g = 0; g < layer.group; ++g)
                    std::copy_n(lines + int64_t(g) * line + i, n, scratch.tile.data() + g * TILE);
                accumulate_tile(n, scratch.packed.data());
            });
            return;
        }
        scratch.values.weigh(scratch.readings[1][run.index], scratch.levels, run, value_layout.split, layer.group,
                             widths.scale(0) + run.begin, widths.scale(1) + run.begin, lines, line);
    }

    void accumulate_tile(int n, float* out) const {
        const int dim = layer.dim;
        four_at_a_time(layer.group, [&](int g, auto count) {
            const float* weights = scratch.tile.data() + g * TILE;
            accumulate<decltype(count)::value>(scratch.floats.data(), n, dim, weights, out + g * dim, dim);
        });
    }

    // Turns n scores of H heads, `stride` apart, into weights, e^(score - the highest), or 0 before the first that is seen,
    // and adds them up.
    template <int H, typename Visit>
    inline void exponentiate(float* scores, int g, int first, int n, float* sums, Visit visit) const {
        __m512 peak[H], sum[H], weights[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) peak[h] = _mm512_set1_ps(scratch.peaks[g + h]), sum[h] = _mm512_setzero_ps();
        for (int t = 0; t < n; t += 16) {
            const __mmask16 there = first_of_16(n - t), observed = there & ~first_of_16(first - t);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                float* at = scores + int64_t(h) * stride + t;
                weights[h] = _mm512_maskz_mov_ps(observed, exp16(load16(at) - peak[h]));
                _mm512_mask_storeu_ps(at, there, weights[h]);
                sum[h] += weights[h];
            }
            visit(t, weights);
        }
        for (int h = 0; h < H; ++h) sums[g + h] += _mm512_reduce_add_ps(sum[h]);
    }

    // The weights of a block of H heads, also in the order of rows.
    template <int H>
    QAQ_NOINLINE void collect_weights(int g, int begin, int n) const {
        const Widths& widths = scratch.widths;
        float* lines = scratch.lines.data() + int64_t(g) * widths.line;
        const float* offset = offset_of(layer.value, begin);
        __m512 shifts[H] = {};
        const auto collect = [&](int t, const __m512* weights) {
            widths.compress<H>(weights, t, lines, widths.line);
            if (!offset) return;
            for (int h = 0; h < H; ++h) shifts[h] += weights[h] * _mm512_maskz_loadu_ps(first_of_16(n - t), offset + t);
        };
        exponentiate<H>(scores(g) + begin, g, first_packed() - begin, n, scratch.masses.data(), collect);
        for (int h = 0; h < H; ++h) scratch.shifts[g + h] += _mm512_reduce_add_ps(shifts[h]);
    }

    void weigh_block(int block, int begin) const {
        const int n = std::min(layer.block_tokens, layer.packed - begin);
        Widths& widths = scratch.widths;
        widths.sort(*this, 4, value_layout, value_scales, block, begin, n);
        room(scratch.lines, size_t(layer.group) * widths.line + TILE);
        four_at_a_time(layer.group, [&](int g, auto heads) { collect_weights<decltype(heads)::value>(g, begin, n); });
        for (int i = 0; i < widths.count; ++i) {
            prepare(1, widths.runs[i].index);
            weigh_rows(widths.runs[i], widths.line);
        }
    }

    void weigh_values() const {
        const int dim = layer.dim, group = layer.group;
        std::fill_n(scratch.residual.data(), group * dim, 0.0f);
        std::fill_n(scratch.packed.data(), group * dim, 0.0f);
        std::fill_n(scratch.masses.data(), group, 0.0f), std::fill_n(scratch.shifts.data(), group, 0.0f);
        std::fill_n(scratch.sums.data(), group, 0.0f);
        four_at_a_time(group, [&](int g, auto heads) {
            exponentiate<decltype(heads)::value>(exact_scores(g), g, first_exact(), exact_tokens(), scratch.sums.data(),
                                                 [](int, const __m512*) {});
        });
        each_residual_tile(layer.value, scratch.floats.data(), [&](int at, int n) {
            const int from = at < layer.sinks ? at : at - layer.packed;
            for (int g = 0; g < group; ++g) std::copy_n(exact_scores(g) + from, n, scratch.tile.data() + g * TILE);
            accumulate_tile(n, scratch.residual.data());
        });
        if (layer.packed) {
            scratch.values.begin(group);
            each_block([&](int block, int begin) { weigh_block(block, begin); });
        }
        for (int g = 0; g < group; ++g) finish(g);
        if (layer.reduction != QAQ_NONE) report();
    }

    // What the values give to query head g, with what centering and the codec took from packed ones.
    void finish(int g) const {
        const int dim = layer.dim;
        const float mass = scratch.masses[g], share = 1 / (scratch.sums[g] += mass);
        const float *mean = layer.value_mean && layer.packed ? layer.value_mean + head * dim : nullptr;
        const float *residual = scratch.residual.data() + g * dim, *packed = scratch.packed.data() + g * dim;
        float *out_residual = layer.out_residual + row(g), *out_packed = layer.out_packed + row(g);
        for (int d = 0; d < dim; d += 8)
            store(out_residual + d, (mean ? load(residual + d) + mass * load(mean + d) : load(residual + d)) * share);
        if (!layer.packed) return;
        scratch.values.finish(g, dim, out_packed);
        for (int d = 0; d < dim; d += 8)
            store(out_packed + d, (load(out_packed + d) + load(packed + d) + scratch.shifts[g]) * share);
    }

    // The statistic, of weights and what makes them probabilities.
    void report() const {
        float* observed = layer.observed + int64_t(head) * length;
        const int first = std::min(first_packed(), layer.packed);
        report(exact_scores(0), 0, layer.sinks, observed);
        std::fill_n(observed + layer.sinks, first, 0.0f);
        report(scores(0) + first, 0, layer.packed - first, observed + layer.sinks + first);
        report(exact_scores(0), layer.sinks, exact_tokens(), observed + layer.packed);
    }
    void report(const float* weights, int begin, int end, float* observed) const {
        const bool squares = layer.reduction == QAQ_MEAN_SQUARE;
        for (int t = begin; t < end; t += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int g = 0; g < layer.group; ++g) {
                const __m512 p = load16(weights + int64_t(g) * stride + t) * (1 / scratch.sums[g]);
                sum = squares ? sum + p * p : _mm512_max_ps(_mm512_max_ps(p, sum), p);
            }
            if (squares) sum *= 1.0f / layer.group;
            _mm512_mask_storeu_ps(observed + t, first_of_16(end - t), sum);
        }
    }
};

// One KV head of one layer.
void attend(const QaqLayer& layer, int head) {
    static thread_local Scratch scratch;
    const size_t dim = layer.dim, group = layer.group;
    const int held = layer.packed ? whole_tiles(layer.packed + 2 * SPAN) : 0;
    const int stride = held + whole_tiles(layer.sinks + layer.recent + 16);
    room(scratch.scores, group * stride);
    room(scratch.tile, group * TILE), room(scratch.floats, TILE * dim);
    room(scratch.coefficients, group * dim + WIDE), room(scratch.residual, group * dim), room(scratch.packed, group * dim);
    for (auto* each : {&scratch.peaks, &scratch.sums, &scratch.masses, &scratch.shifts}) room(*each, group);
    if (layer.packed) scratch.levels.prepare(layer.levels);
    const Head one{{layer, head, layer.sinks + layer.packed + layer.recent},
                   scratch, held, stride,
                   Scales(layer.key), Scales(layer.value),
                   Layout(layer.key.order, layer.packed ? layer.dim : 0, layer.key.split, layer.levels),
                   Layout(layer.value.order, layer.packed ? layer.dim : 0, layer.value.split, layer.levels)};
    one.score();
    one.weigh_values();
}

}  // namespace
QAQ_END_TARGET
