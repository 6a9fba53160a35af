// Attention of one KV head with AVX-512: scores of all tokens, then softmax and weighted values, a block at a time.
#pragma once
#define QAQ_AVX512

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

#include "float_rows.h"
#include "head_avx512.h"
#include "key_mean.h"
#include "runs_avx512.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

struct HeadAttention : HeadRows {
    // Initializes a block's scores with those of the keys' mean. Writes up to SPAN numbers more.
    void score_means(int begin, int n) const {
        for (int g = 0; g < layer.group; g += 4)
            for (int t = begin; t < begin + n; t += SPAN)
                scratch.means.span(layer.start + t, scratch.coefficients.data() + g * layer.dim,
                                   std::min(4, layer.group - g), scores(g) + t, stride);
    }

    void dot(const float* rows, int n, const float* queries, int g, int heads) const {
        four_at_a_time(heads, [&](int h, auto count) {
            dots<decltype(count)::value>(rows, n, layer.dim, queries + h * layer.stride, layer.stride,
                                         scratch.tile.data() + (g + h) * TILE);
        });
    }

    void score_rows(const WidthRun& run, int padded) const {
        const RowsByWidth& widths = scratch.widths;
        float* by_row = scratch.by_row.data() + run.begin;
        if (run.index == HALF) {
            each_half_tile(key_layout, run, [&](int i, int n) {
                dot(scratch.floats.data(), n, transformed(0), 0, layer.group);
                for (int g = 0; g < layer.group; ++g)
                    std::copy_n(scratch.tile.data() + g * TILE, n, by_row + int64_t(g) * padded + i);
            });
            return;
        }
        scratch.keys.score(scratch.readers[0][run.index], scratch.levels, run, widths.scale(0) + run.begin,
                           widths.scale(1) + run.begin, by_row, padded);
    }

    void score_block(int block, int begin) const {
        const int n = std::min(layer.block_tokens, layer.packed - begin);
        RowsByWidth& widths = scratch.widths;
        widths.group(*this, 0, key_layout, key_scales, block, begin, n);
        grow(scratch.by_row, size_t(layer.group) * widths.padded + TILE);
        if (layer.key_mean) score_means(begin, n);
        for (int i = 0; i < widths.count; ++i) {
            prepare(0, widths.runs[i].index);
            score_rows(widths.runs[i], widths.padded);
        }
        four_at_a_time(layer.group, [&](int g, auto heads) { place_scores<decltype(heads)::value>(g, begin, n); });
    }

    // Brings the scores of H heads from row order to position order, and adds those of the mean and the offset.
    template <int H>
    QAQ_NOINLINE void place_scores(int g, int begin, int n) const {
        const RowsByWidth& widths = scratch.widths;
        const float* by_row = scratch.by_row.data() + int64_t(g) * widths.padded;
        const float* offset = offset_of(layer.key, begin);
        const bool has_means = layer.key_mean;
        float* to = scores(g) + begin;
        __m512 peaks[H], numbers[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) peaks[h] = _mm512_set1_ps(scratch.peaks[g + h]);
        for (int t = 0; t < n; t += 16) {
            const __mmask16 valid = first_of_16(n - t), visible = valid & ~first_of_16(first_packed() - begin - t);
            widths.expand<H>(by_row, widths.padded, t, numbers);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                float* at = to + int64_t(h) * stride + t;
                if (has_means) numbers[h] += load16(at);
                if (offset) numbers[h] += _mm512_maskz_loadu_ps(valid, offset + t) * scratch.shifts[g + h];
                store16(at, numbers[h]);
                peaks[h] = _mm512_mask_max_ps(peaks[h], visible, numbers[h], peaks[h]);
            }
        }
        for (int h = 0; h < H; ++h) scratch.peaks[g + h] = _mm512_reduce_max_ps(peaks[h]);
    }

    void score() const {
        const int group = layer.group, dim = layer.dim;
        std::fill_n(scratch.peaks.data(), group, -std::numeric_limits<float>::infinity());
        each_residual_tile(layer.key, scratch.floats.data(), [&](int at, int n) {
            dot(scratch.floats.data(), n, query(0), 0, group);
            const int to = at < layer.sinks ? at : at - layer.packed;
            for (int g = 0; g < group; ++g) std::copy_n(scratch.tile.data() + g * TILE, n, residual_scores(g) + to);
        });
        for (int g = 0; g < group; ++g)
            for (int t = first_residual(); t < residual_tokens(); ++t)
                scratch.peaks[g] = std::max(scratch.peaks[g], residual_scores(g)[t]);
        if (!layer.packed) return;
        if (layer.key_mean) {
            scratch.means.prepare(layer.angles, dim);
            for (int g = 0; g < group; ++g)
                scratch.means.project(query(g), layer.key_mean + head * dim, scratch.coefficients.data() + g * dim);
        }
        for (int g = 0; g < group; ++g)
            scratch.shifts[g] = layer.key.offset ? std::accumulate(transformed(g), transformed(g) + dim, 0.0f) : 0.0f;
        each_block([&](int block, int begin) { score_block(block, begin); });
    }

    void weigh_rows(const WidthRun& run, int padded) const {
        const RowsByWidth& widths = scratch.widths;
        const float* by_row = scratch.by_row.data() + run.begin;
        if (run.index == HALF) {
            each_half_tile(value_layout, run, [&](int i, int n) {
                for (int g = 0; g < layer.group; ++g)
                    std::copy_n(by_row + int64_t(g) * padded + i, n, scratch.tile.data() + g * TILE);
                accumulate_tile(n, scratch.packed.data());
            });
            return;
        }
        scratch.values.weigh(scratch.readers[1][run.index], scratch.levels, run, value_layout.split, layer.group,
                             widths.scale(0) + run.begin, widths.scale(1) + run.begin, by_row, padded);
    }

    void accumulate_tile(int n, float* out) const {
        const int dim = layer.dim;
        four_at_a_time(layer.group, [&](int g, auto count) {
            const float* weights = scratch.tile.data() + g * TILE;
            accumulate<decltype(count)::value>(scratch.floats.data(), n, dim, weights, out + g * dim, dim);
        });
    }

    // Replaces n scores of H heads, `stride` apart, by weights e^(score - the head's highest), or 0 before token
    // `first`, and adds them to `sums`. Calls visit(t, weights of 16 tokens).
    template <int H, typename Visit>
    inline void exponentiate(float* scores, int g, int first, int n, float* sums, Visit visit) const {
        __m512 peak[H], sum[H], weights[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) peak[h] = _mm512_set1_ps(scratch.peaks[g + h]), sum[h] = _mm512_setzero_ps();
        for (int t = 0; t < n; t += 16) {
            const __mmask16 valid = first_of_16(n - t), visible = valid & ~first_of_16(first - t);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                float* at = scores + int64_t(h) * stride + t;
                weights[h] = _mm512_maskz_mov_ps(visible, exp16(load16(at) - peak[h]));
                _mm512_mask_storeu_ps(at, valid, weights[h]);
                sum[h] += weights[h];
            }
            visit(t, weights);
        }
        for (int h = 0; h < H; ++h) sums[g + h] += _mm512_reduce_add_ps(sum[h]);
    }

    // Makes the weights of a block of H heads, also in row order.
    template <int H>
    QAQ_NOINLINE void collect_weights(int g, int begin, int n) const {
        const RowsByWidth& widths = scratch.widths;
        float* by_row = scratch.by_row.data() + int64_t(g) * widths.padded;
        const float* offset = offset_of(layer.value, begin);
        __m512 shifts[H] = {};
        const auto collect = [&](int t, const __m512* weights) {
            widths.compress<H>(weights, t, by_row, widths.padded);
            if (!offset) return;
            for (int h = 0; h < H; ++h) shifts[h] += weights[h] * _mm512_maskz_loadu_ps(first_of_16(n - t), offset + t);
        };
        exponentiate<H>(scores(g) + begin, g, first_packed() - begin, n, scratch.masses.data(), collect);
        for (int h = 0; h < H; ++h) scratch.shifts[g + h] += _mm512_reduce_add_ps(shifts[h]);
    }

    void weigh_block(int block, int begin) const {
        const int n = std::min(layer.block_tokens, layer.packed - begin);
        RowsByWidth& widths = scratch.widths;
        widths.group(*this, 4, value_layout, value_scales, block, begin, n);
        grow(scratch.by_row, size_t(layer.group) * widths.padded + TILE);
        four_at_a_time(layer.group, [&](int g, auto heads) { collect_weights<decltype(heads)::value>(g, begin, n); });
        for (int i = 0; i < widths.count; ++i) {
            prepare(1, widths.runs[i].index);
            weigh_rows(widths.runs[i], widths.padded);
        }
    }

    void weigh_values() const {
        const int dim = layer.dim, group = layer.group;
        std::fill_n(scratch.residual.data(), group * dim, 0.0f);
        std::fill_n(scratch.packed.data(), group * dim, 0.0f);
        std::fill_n(scratch.masses.data(), group, 0.0f), std::fill_n(scratch.shifts.data(), group, 0.0f);
        std::fill_n(scratch.sums.data(), group, 0.0f);
        four_at_a_time(group, [&](int g, auto heads) {
            exponentiate<decltype(heads)::value>(residual_scores(g), g, first_residual(), residual_tokens(),
                                                 scratch.sums.data(), [](int, const __m512*) {});
        });
        each_residual_tile(layer.value, scratch.floats.data(), [&](int at, int n) {
            const int from = at < layer.sinks ? at : at - layer.packed;
            for (int g = 0; g < group; ++g) std::copy_n(residual_scores(g) + from, n, scratch.tile.data() + g * TILE);
            accumulate_tile(n, scratch.residual.data());
        });
        if (layer.packed) {
            scratch.values.begin(group);
            each_block([&](int block, int begin) { weigh_block(block, begin); });
        }
        for (int g = 0; g < group; ++g) finish(g);
        if (layer.reduction != QAQ_NONE) observe();
    }

    // Writes query head g's output, with the mean and the offset that the codec took from packed values.
    void finish(int g) const {
        const int dim = layer.dim;
        const float mass = scratch.masses[g], share = 1 / (scratch.sums[g] += mass);
        if (layer.log_sums) layer.log_sums[head * layer.group + g] = scratch.peaks[g] + std::log(scratch.sums[g]);
        const float* mean = layer.value_mean && layer.packed ? layer.value_mean + head * dim : nullptr;
        const float *residual = scratch.residual.data() + g * dim, *packed = scratch.packed.data() + g * dim;
        float *out_residual = layer.out_residual + row(g), *out_packed = layer.out_packed + row(g);
        for (int d = 0; d < dim; d += 8)
            store(out_residual + d, (mean ? load(residual + d) + mass * load(mean + d) : load(residual + d)) * share);
        if (!layer.packed) return;
        scratch.values.finish(g, dim, out_packed);
        for (int d = 0; d < dim; d += 8)
            store(out_packed + d, (load(out_packed + d) + load(packed + d) + scratch.shifts[g]) * share);
    }

    // Writes the statistic of all tokens' probabilities.
    void observe() const {
        float* observed = layer.observed + int64_t(head) * length;
        const int first = std::min(first_packed(), layer.packed);
        observe(residual_scores(0), 0, layer.sinks, observed);
        std::fill_n(observed + layer.sinks, first, 0.0f);
        observe(scores(0) + first, 0, layer.packed - first, observed + layer.sinks + first);
        observe(residual_scores(0), layer.sinks, residual_tokens(), observed + layer.packed);
    }
    void observe(const float* weights, int begin, int end, float* observed) const {
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

// Attends with the query heads of one KV head.
void attend(const QaqLayer& layer, int head) {
    static thread_local Scratch scratch;
    const size_t dim = layer.dim, group = layer.group;
    const int packed_size = layer.packed ? whole_tiles(layer.packed + 2 * SPAN) : 0;
    const int stride = packed_size + whole_tiles(layer.sinks + layer.recent + 16);
    grow(scratch.scores, group * stride);
    grow(scratch.tile, group * TILE), grow(scratch.floats, TILE * dim);
    grow(scratch.coefficients, group * dim + WIDE), grow(scratch.residual, group * dim),
        grow(scratch.packed, group * dim);
    for (auto* each : {&scratch.peaks, &scratch.sums, &scratch.masses, &scratch.shifts}) grow(*each, group);
    if (layer.packed) scratch.levels.prepare(layer.levels);
    const HeadAttention one{{{layer, head, layer.sinks + layer.packed + layer.recent},
                             scratch,
                             packed_size,
                             stride,
                             Scales(layer.key),
                             Scales(layer.value),
                             Layout(layer.key.order, layer.packed ? layer.dim : 0, layer.key.split, layer.levels),
                             Layout(layer.value.order, layer.packed ? layer.dim : 0, layer.value.split, layer.levels)}};
    one.score();
    one.weigh_values();
}

}  // namespace
QAQ_END_TARGET
