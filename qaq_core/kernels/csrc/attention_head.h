// Attention of one KV head without AVX-512: scores of all tokens, softmax, weighted values. Rows of one width are
// contiguous in their pool, so each width is a tight loop over its rows, and scores are scattered to their positions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "buffer.h"
#include "float_rows.h"
#include "head_tiles.h"
#include "key_mean.h"
#include "packed_rows.h"
#include "quads.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

struct HeadAttention : HeadTiles {
    // Initializes the scores of the block from `begin` on: with those of the keys' mean and of the codec's offset. May
    // write up to SPAN positions more.
    void begin_scores(int begin) const {
        const int end = std::min(begin + layer.block_tokens, layer.packed);
        for (int q = 0; q < quads; ++q) {
            float* to = packed_scores(q, begin);
            const int heads = std::min(QUAD, layer.group - QUAD * q);
            if (!layer.key_mean) {
                std::fill(to, to + QUAD * (end - begin), 0.0f);
            } else {
                alignas(32) float four[QUAD][SPAN] = {};
                for (int t = begin; t < end; t += SPAN, to += QUAD * SPAN) {
                    scratch.means.span(layer.start + t, scratch.coefficients.data() + QUAD * q * layer.dim, heads,
                                       four[0], SPAN);
                    for (int x = 0; x < SPAN; x += 8)
                        to_quads(four[0] + x, SPAN, [&](int i, f4 quad) { store4(to + QUAD * (x + i), quad); });
                }
            }
            if (!layer.key.offset) continue;
            const float* offset = layer.key.offset + head * layer.key.affine_head_stride;
            f4 sums = {};
            for (int h = 0; h < heads; ++h)
                sums[h] = std::accumulate(transformed(QUAD * q + h), transformed(QUAD * q + h) + layer.dim, 0.0f);
            for (int t = begin; t < end; ++t) {
                float* at = packed_scores(q, t);
                store4(at, load4(at) + sums * offset[t]);
            }
        }
    }

    void score() const {
        const int group = layer.group, dim = layer.dim;
        if (layer.packed) {
            const Layout layout(layer.key.order, dim, layer.key.split, layer.levels);
            scratch.rows.prepare_keys(layer.levels, transformed(0), layer.stride, group, dim);
            if (layer.key_mean) {
                scratch.means.prepare(layer.angles, dim);
                for (int g = 0; g < group; ++g)
                    scratch.means.project(query(g), layer.key_mean + head * dim, scratch.coefficients.data() + g * dim);
            }
            each_block([&](int block, int begin) {
                begin_scores(begin);
                each_packed_tile(0, layout, block, [&](const Tile& tile, const int32_t* positions) {
                    score_rows(layout, tile, group, transformed(0), layer.stride, by_row(), scratch.rows);
                    scatter(tile.n, positions, begin);
                });
            });
        }
        const float* residual = scratch.rows.floats.data();
        each_residual_tile(layer.key, scratch.rows.floats.data(), [&](int at, int n) {
            four_at_a_time(group, [&](int g, auto count) {
                dots<decltype(count)::value>(residual, n, dim, query(g), layer.stride, by_row() + g * TILE);
            });
            for (int q = 0; q < quads; ++q)
                for (int i = 0; i < n; ++i)
                    for (int h = 0; h < QUAD; ++h) scores(q)[QUAD * (at + i) + h] = by_row()[(QUAD * q + h) * TILE + i];
        });
    }

    // Adds the scores of n rows at their positions in the block from `begin` on.
    void scatter(int n, const int32_t* positions, int begin) const {
        for (int q = 0; q < quads; ++q) {
            float* to = packed_scores(q, begin);
            for (int i = 0; i < n; i += 8)
                to_quads(by_row() + QUAD * q * TILE + i, TILE, [&](int k, f4 quad) {
                    float* at = to + int64_t(QUAD) * positions[i + k];
                    store4(at, load4(at) + quad);
                });
        }
    }

    // Brings the weights of n rows into row order, with zeros up to a multiple of 32 rows.
    void gather(int n, const int32_t* positions, int begin) const {
        for (int q = 0; q < quads; ++q) {
            const float* from = packed_scores(q, begin);
            float* to = by_row() + QUAD * q * TILE;
            int i = 0;
            for (; i < n; i += 8)
                to_heads([&](int k) { return from + int64_t(QUAD) * positions[i + k]; }, to + i, TILE);
            for (; i % 32; i += 8)
                for (int h = 0; h < QUAD; ++h) store(to + h * TILE + i, f8{});
        }
    }

    // Replaces scores by weights, which times the head's share are probabilities, and writes the statistic.
    void softmax() const {
        float* observed = layer.observed + int64_t(head) * length;
        const bool squares = layer.reduction == QAQ_MEAN_SQUARE;
        for (int q = 0; q < quads; ++q) {
            f4 peaks;
            const f4 sums = exponentiate(scores(q), layer.first, length, padded, peaks);
            const f4 shares = 1.0f / sums;
            const int heads = std::min(QUAD, layer.group - QUAD * q);
            store4(scratch.shares.data() + QUAD * q, shares);
            if (layer.log_sums)
                for (int h = 0; h < heads; ++h)
                    layer.log_sums[head * layer.group + QUAD * q + h] = peaks[h] + std::log(sums[h]);
            if (layer.reduction == QAQ_NONE) continue;
            const float* weights = scores(q);
            alignas(32) float four[4][8];
            for (int t = 0; t < length; t += 8) {
                to_heads([&](int i) { return weights + QUAD * (t + i); }, four[0], 8);
                f8 sum = {};
                for (int h = 0; h < heads; ++h) {
                    const f8 p = load(four[h]) * shares[h];
                    sum = squares ? sum + p * p : ((p > sum) | (p != p)) ? p : sum;
                }
                if (squares) sum *= 1.0f / layer.group;
                for (int i = 0; i < 8 && t + i < length; ++i) {
                    float& to = observed[t + i];
                    to = !q ? sum[i] : squares ? to + sum[i] : (sum[i] > to || sum[i] != sum[i]) ? sum[i] : to;
                }
            }
        }
    }

    void weigh_values() const {
        const int dim = layer.dim, group = layer.group;
        float *residual = scratch.residual.data(), *packed = scratch.packed.data();
        std::fill(residual, residual + group * dim, 0.0f);
        each_residual_tile(layer.value, scratch.rows.floats.data(), [&](int at, int n) {
            for (int g = 0; g < group; ++g)
                for (int i = 0; i < n; ++i) by_row()[g * TILE + i] = scores(g / QUAD)[QUAD * (at + i) + g % QUAD];
            four_at_a_time(group, [&](int g, auto count) {
                accumulate<decltype(count)::value>(scratch.rows.floats.data(), n, dim, by_row() + g * TILE,
                                                   residual + g * dim, dim);
            });
        });
        if (layer.packed) {
            std::fill(packed, packed + group * dim, 0.0f);
            const Layout layout(layer.value.order, dim, layer.value.split, layer.levels);
            scratch.rows.prepare_values(layer.levels);
            each_block([&](int block, int begin) {
                each_packed_tile(4, layout, block, [&](const Tile& tile, const int32_t* positions) {
                    gather(tile.n, positions, begin);
                    weigh_rows(layout, tile, group, by_row(), packed, dim, scratch.rows);
                });
            });
        }
        for (int q = 0; q < quads; ++q) {
            const f4 masses = sum(packed_scores(q, 0), layer.packed);
            for (int g = QUAD * q; g < std::min(group, QUAD * (q + 1)); ++g) finish(g, masses[g % QUAD]);
        }
    }

    // Writes query head g's output, with the mean and the offset that the codec took from packed values.
    // mass: the sum of their weights.
    void finish(int g, float mass) const {
        const int dim = layer.dim;
        const float* mean = layer.value_mean && layer.packed ? layer.value_mean + head * dim : nullptr;
        const float share = scratch.shares[g];
        const float *residual = scratch.residual.data() + g * dim, *packed = scratch.packed.data() + g * dim;
        float *out_residual = layer.out_residual + row(g), *out_packed = layer.out_packed + row(g);
        for (int d = 0; d < dim; d += 8)
            store(out_residual + d, (mean ? load(residual + d) + mass * load(mean + d) : load(residual + d)) * share);
        if (!layer.packed) return;
        float shift = 0;
        if (const float* offset = layer.value.offset) {
            const float* weights = packed_scores(g / QUAD, 0) + g % QUAD;
            offset += head * layer.value.affine_head_stride;
            for (int t = 0; t < layer.packed; ++t) shift += weights[QUAD * t] * offset[t];
        }
        for (int d = 0; d < dim; d += 8) store(out_packed + d, (load(packed + d) + shift) * share);
    }
};

// Attends with the query heads of one KV head.
void attend(const QaqLayer& layer, int head) {
    static thread_local Scratch scratch;
    const int length = layer.sinks + layer.packed + layer.recent, padded = (length + 7) / 8 * 8 + SPAN;
    const int quads = (layer.group + QUAD - 1) / QUAD;
    const size_t dim = layer.dim, group = layer.group;
    grow(scratch.scores, size_t(padded) * quads * QUAD);
    grow(scratch.by_row, size_t(quads) * QUAD * TILE);
    grow(scratch.coefficients, group * dim + WIDE);
    grow(scratch.shares, size_t(quads) * QUAD);
    grow(scratch.residual, group * dim);
    grow(scratch.packed, group * dim);
    grow(scratch.positions, size_t(layer.block_tokens) + 16);
    grow(scratch.rows.floats, TILE * dim);
    const HeadAttention one{{{layer, head, length}, scratch, padded, quads}};
    one.score();
    one.softmax();
    one.weigh_values();
}

}  // namespace
QAQ_END_TARGET
