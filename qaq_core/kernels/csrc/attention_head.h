// The operation, written once and compiled once per instruction set, in a namespace of its own. Per KV head: scores of
// all tokens, softmax, weighted values. Rows of one width are contiguous in their pool, so each width is a tight loop
// over its rows, and scores are scattered to their positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "buffer.h"
#include "head.h"
#include "key_mean.h"
#include "packed_rows.h"
#include "quads.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

struct Scratch {  // one per thread, kept from call to call
    std::vector<float> scores, lines, coefficients, residual, packed, shares;
    std::vector<int32_t> positions;
    MeanScores means;
    Bench bench;
};

struct Head : HeadOfLayer {
    Scratch& scratch;
    int padded, quads;

    // Of a quad of query heads: [padded][QUAD].
    float* scores(int quad) const { return scratch.scores.data() + int64_t(quad) * padded * QUAD; }
    float* packed_scores(int quad, int begin) const { return scores(quad) + int64_t(layer.sinks + begin) * QUAD; }
    float* lines() const { return scratch.lines.data(); }  // [4 * quads][TILE]

    // Positions, within n tags, of those whose nibble is `index`. What follows them up to a multiple of eight is
    // `nowhere`, the position of no token.
    int find(const uint8_t* tags, int n, int shift, int index, int nowhere) const {
        int32_t* out = scratch.positions.data();
        int found = 0, t = 0;
#ifdef QAQ_AVX2
        const __m256i want = _mm256_set1_epi8(char(index << shift)), nibble = _mm256_set1_epi8(char(15 << shift));
        for (; t + 32 <= n; t += 32) {
            const __m256i tag = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tags + t));
            uint32_t here = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(tag, nibble), want));
            for (int i = 0; i < 32; i += 8, here >>= 8) {
                const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(ranks.of[here & 255]));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + found),
                                    _mm256_add_epi32(_mm256_cvtepu8_epi32(places), _mm256_set1_epi32(t + i)));
                found += __builtin_popcount(here & 255);
            }
        }
#endif
        for (; t < n; ++t)
            if ((tags[t] >> shift & 15) == index) out[found++] = t;
        std::fill(out + found, out + (found + 7) / 8 * 8, nowhere);
        return found;
    }

    // scales[part * TILE + i] of the octets before the split and of the others, of tokens t + positions[i]; numbers
    // follow up to a multiple of 32.
    void look_up_scales(const QaqSide& side, int64_t t, const int32_t* positions, int n, float* scales) const {
        const int64_t begin = head * side.affine_head_stride + t;
        const auto look_up = [&](auto scale_of) {
            int i = 0;
            for (; i + 8 <= n; i += 8)
                to_parts([&](int k) { return scale_of(begin + positions[i + k]); }, side.parts - 1, scales + i);
            if (i < n)
                to_parts([&](int k) { return scale_of(begin + positions[std::min(i + k, n - 1)]); }, side.parts - 1,
                         scales + i);
        };
        if (side.meta && side.parts == 2) {
            look_up([&](int64_t at) { return side.scales + side.meta[at] * 2; });
        } else if (side.meta) {
            look_up([&](int64_t at) { return side.scales + side.meta[at] * side.parts; });
        } else {
            look_up([&](int64_t at) { return side.scale + at * side.parts; });
        }
        for (int i = (n + 7) / 8 * 8; i % 32; i += 8) store(scales + i, f8{}), store(scales + TILE + i, f8{});
    }

    // Calls visit(tile, positions) for a block's packed rows of the keys (shift 0) or values (shift 4), TILE at a time.
    template <typename Visit>
    void each_packed_tile(int shift, const Layout& layout, int block, Visit visit) const {
        const QaqSide& side = shift ? layer.value : layer.key;
        const int begin = block * layer.block_tokens, n = std::min(layer.block_tokens, layer.packed - begin);
        const uint8_t* tags = layer.tags + head * layer.tags_head_stride + begin;
        const int nowhere = padded - 1 - layer.sinks - begin;
        float scales[2 * TILE];
        for (int index = 1; index < QAQ_WIDTHS; ++index) {
            if (!side.rows[block].base[index]) continue;
            const int found = find(tags, n, shift, index, nowhere), bytes = layout.row_bytes(index);
            const int64_t before = side.rows[block].first[head * QAQ_WIDTHS + index];
            const uint8_t* rows = side.rows[block].base[index] + before * bytes;
            for (int i = 0; i < found; i += TILE) {
                const int some = std::min(TILE, found - i);
                const int32_t* positions = scratch.positions.data() + i;
                look_up_scales(side, begin, positions, some, scales);
                const bool last = int64_t(found - i - some) * bytes < BEYOND;
                visit(Tile{rows + int64_t(i) * bytes, index, some, last, scales}, positions);
            }
        }
    }

    // Scores of packed tokens from `begin` on, before their rows are counted: of the keys' mean and the codec's offset.
    // May write up to SPAN positions more.
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
                    scratch.means.span(layer.start + t, scratch.coefficients.data() + QUAD * q * layer.dim, heads, four[0], SPAN);
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
            scratch.bench.prepare_keys(layer.levels, transformed(0), layer.stride, group, dim);
            if (layer.key_mean) {
                scratch.means.prepare(layer.angles, dim);
                for (int g = 0; g < group; ++g) scratch.means.pose(query(g), layer.key_mean + head * dim, scratch.coefficients.data() + g * dim);
            }
            each_block([&](int block, int begin) {
                begin_scores(begin);
                each_packed_tile(0, layout, block, [&](const Tile& tile, const int32_t* positions) {
                    score_rows(layout, tile, group, transformed(0), layer.stride, lines(), scratch.bench);
                    scatter(tile.n, positions, begin);
                });
            });
        }
        const float* residual = scratch.bench.floats.data();
        each_residual_tile(layer.key, scratch.bench.floats.data(), [&](int at, int n) {
            four_at_a_time(group, [&](int g, auto count) {
                dots<decltype(count)::value>(residual, n, dim, query(g), layer.stride, lines() + g * TILE);
            });
            for (int q = 0; q < quads; ++q)
                for (int i = 0; i < n; ++i)
                    for (int h = 0; h < QUAD; ++h)
                        scores(q)[QUAD * (at + i) + h] = lines()[(QUAD * q + h) * TILE + i];
        });
    }

    // Adds scores of n rows to those of the positions from `begin` on.
    void scatter(int n, const int32_t* positions, int begin) const {
        for (int q = 0; q < quads; ++q) {
            float* to = packed_scores(q, begin);
            for (int i = 0; i < n; i += 8)
                to_quads(lines() + QUAD * q * TILE + i, TILE, [&](int k, f4 quad) {
                    float* at = to + int64_t(QUAD) * positions[i + k];
                    store4(at, load4(at) + quad);
                });
        }
    }

    // The weights of n rows, up to a multiple of 32 rows.
    void gather(int n, const int32_t* positions, int begin) const {
        for (int q = 0; q < quads; ++q) {
            const float* from = packed_scores(q, begin);
            float* to = lines() + QUAD * q * TILE;
            int i = 0;
            for (; i < n; i += 8)
                to_heads([&](int k) { return from + int64_t(QUAD) * positions[i + k]; }, to + i, TILE);
            for (; i % 32; i += 8)
                for (int h = 0; h < QUAD; ++h) store(to + h * TILE + i, f8{});
        }
    }

    // Turns scores into weights, of which each head's share makes probabilities, and reports the statistic.
    void softmax() const {
        float* observed = layer.observed + int64_t(head) * length;
        const bool squares = layer.reduction == QAQ_MEAN_SQUARE;
        for (int q = 0; q < quads; ++q) {
            const f4 sums = exponentiate(scores(q), layer.first, length, padded);
            const f4 shares = 1.0f / sums;
            const int heads = std::min(QUAD, layer.group - QUAD * q);
            store4(scratch.shares.data() + QUAD * q, shares);
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
        each_residual_tile(layer.value, scratch.bench.floats.data(), [&](int at, int n) {
            for (int g = 0; g < group; ++g)
                for (int i = 0; i < n; ++i)
                    lines()[g * TILE + i] = scores(g / QUAD)[QUAD * (at + i) + g % QUAD];
            four_at_a_time(group, [&](int g, auto count) {
                accumulate<decltype(count)::value>(scratch.bench.floats.data(), n, dim, lines() + g * TILE,
                                                   residual + g * dim, dim);
            });
        });
        if (layer.packed) {
            std::fill(packed, packed + group * dim, 0.0f);
            const Layout layout(layer.value.order, dim, layer.value.split, layer.levels);
            scratch.bench.prepare_values(layer.levels);
            each_block([&](int block, int begin) {
                each_packed_tile(4, layout, block, [&](const Tile& tile, const int32_t* positions) {
                    gather(tile.n, positions, begin);
                    weigh_rows(layout, tile, group, lines(), packed, dim, scratch.bench);
                });
            });
        }
        for (int q = 0; q < quads; ++q) {
            const f4 masses = sum(packed_scores(q, 0), layer.packed);
            for (int g = QUAD * q; g < std::min(group, QUAD * (q + 1)); ++g) finish(g, masses[g % QUAD]);
        }
    }

    // What the values give to query head g, with what centering and the codec took from packed ones.
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

// One KV head of one layer.
void attend(const QaqLayer& layer, int head) {
    static thread_local Scratch scratch;
    const int length = layer.sinks + layer.packed + layer.recent, padded = (length + 7) / 8 * 8 + SPAN;
    const int quads = (layer.group + QUAD - 1) / QUAD;
    const size_t dim = layer.dim, group = layer.group;
    room(scratch.scores, size_t(padded) * quads * QUAD);
    room(scratch.lines, size_t(quads) * QUAD * TILE);
    room(scratch.coefficients, group * dim + WIDE);
    room(scratch.shares, size_t(quads) * QUAD);
    room(scratch.residual, group * dim);
    room(scratch.packed, group * dim);
    room(scratch.positions, size_t(layer.block_tokens) + 16);
    room(scratch.bench.floats, TILE * dim);
    const Head one{{layer, head, length}, scratch, padded, quads};
    one.score();
    one.softmax();
    one.weigh_values();
}

}  // namespace
QAQ_END_TARGET
