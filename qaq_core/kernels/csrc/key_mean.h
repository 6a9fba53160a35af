// Scores of the keys' mean, q·RoPE(mean, t): a sum over pairs of dims of a·cos(θt) + b·sin(θt), for SPAN positions at a
// time.
//
// a and b are rotated to the middle of the span. Around it cosines are even and sines odd, so both are summed for the
// later half only; their sums and differences are the scores. The angles within a span are the same for all spans. Fast
// pairs are summed at every position. The sum of slow pairs is smooth within a span, so it is interpolated from NODES
// positions, which lie symmetrically around the middle.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "layout.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int SPAN = 64, HALF_SPAN = SPAN / 2, NODES = 8;
constexpr int NODE[NODES] = {0, 5, 14, 25, 38, 49, 58, 63};  // near Chebyshev nodes

// A pair is slow if the cosine of its angle per position is at least this (0.04 rad). Interpolation errs by 2e-6 at
// most.
constexpr float SLOW = 0.9992f;

// of[k][x]: the Lagrange polynomial that is 1 at NODE[k] and 0 at the other nodes.
struct Basis {
    float of[NODES][SPAN];
    constexpr Basis() : of() {
        for (int k = 0; k < NODES; ++k)
            for (int x = 0; x < SPAN; ++x) {
                double product = 1;
                for (int i = 0; i < NODES; ++i)
                    if (i != k) product *= double(x - NODE[i]) / (NODE[k] - NODE[i]);
                of[k][x] = float(product);
            }
    }
};
constexpr Basis basis;

struct KeyMeanScores {
    static constexpr int PAIRS = NODES / 2;  // of nodes, symmetric around the middle

    int dim = 0, half, fast;    // the first `fast` pairs are fast
    const float* angles;        // [positions][dim], cosines and sines
    std::vector<float> known;   // the second row of angles, which determines all of them
    std::vector<float> middle;  // [dim], cosines and sines of the middle of the first span
    Buffer<float> rows;   // [dim + NODES][HALF_SPAN], cosines and sines of fast pairs; even and odd parts of the basis
    Buffer<float> nodes;  // [half / WIDE][2][PAIRS][WIDE], cosines and sines of slow pairs; 0 for fast ones

    // Builds the tables, unless they are those of the same angles. Pairs rotate by less than 2 rad a position, as in
    // RoPE, so the angle halfway between two positions follows from theirs.
    QAQ_NOINLINE void prepare(const float* table, int width) {
        angles = table;
        if (dim == width && std::equal(known.begin(), known.end(), angles + dim)) return;
        dim = width, half = dim / 2;
        known.assign(angles + dim, angles + 2 * dim);
        for (fast = half; fast && angles[dim + fast - 1] >= SLOW;) --fast;
        rows.resize(size_t(dim + NODES) * HALF_SPAN), middle.resize(dim);
        nodes.resize(size_t(half + WIDE) * NODES);
        for (int d = 0; d < dim; ++d) {
            const int i = d % half, side = d / half;
            const float twice = 2 * std::sqrt((1 + angles[dim + i]) / 2);  // the cosine of half a step
            float* row = rows.data() + d * HALF_SPAN;
            for (int x = 0; x < HALF_SPAN; ++x) row[x] = (angles[x * dim + d] + angles[(x + 1) * dim + d]) / twice;
            middle[d] = row[HALF_SPAN - 1];
            for (int k = 0; k < PAIRS; ++k) {
                const float at = row[HALF_SPAN - 1 - NODE[k]];  // the node lies before the middle
                nodes[((i / WIDE * 2 + side) * PAIRS + k) * WIDE + i % WIDE] = i < fast ? 0 : side ? -at : at;
            }
        }
        for (int k = 0; k < PAIRS; ++k)
            for (int x = 0; x < HALF_SPAN; ++x) {
                const float after = basis.of[k][HALF_SPAN + x], before = basis.of[k][HALF_SPAN - 1 - x];
                rows[(dim + k) * HALF_SPAN + x] = after + before;
                rows[(dim + PAIRS + k) * HALF_SPAN + x] = after - before;
            }
    }

    // coefficients [dim]: a and b of every pair, for the span whose middle is position 0.
    void project(const float* query, const float* mean, float* coefficients) const {
        for (int i = 0; i < half; i += 8) {
            const f8 q1 = load(query + i), q2 = load(query + half + i), m1 = load(mean + i), m2 = load(mean + half + i);
            const f8 a = q1 * m1 + q2 * m2, b = q2 * m1 - q1 * m2;
            const f8 c = load(middle.data() + i), s = load(middle.data() + half + i);
            store(coefficients + i, a * c + b * s), store(coefficients + half + i, b * c - a * s);
        }
    }

    // scores[h * stride + x] of up to four query heads at positions start + x.
    void span(int64_t start, const float* coefficients, int heads, float* scores, int64_t stride) const {
        alignas(64) float weights[4][MAX_DIM + 16];
        const float* angle = angles + start * dim;
        for (int d = 0; d < dim; d += 16) __builtin_prefetch(angle + SPAN * dim + d);
        for (int h = 0; h < heads; ++h) weigh(angle, coefficients + h * dim, weights[h]);
#ifdef QAQ_AVX512
        const int64_t step = weights[1] - weights[0];
        (this->*(heads == 1   ? &KeyMeanScores::add_up<1>
                 : heads == 2 ? &KeyMeanScores::add_up<2>
                 : heads == 3 ? &KeyMeanScores::add_up<3>
                              : &KeyMeanScores::add_up<4>))(weights[0], step, scores, stride);
#else
        for (int h = 0; h < heads; ++h) add_up<1>(weights[h], 0, scores + h * stride, stride);
#endif
    }

  private:
    static wide at(const float* p) { return *reinterpret_cast<const wide_u*>(p); }
    static void put(float* p, wide v) { *reinterpret_cast<wide_u*>(p) = v; }
    static wide reversed(wide v) {
#ifdef QAQ_AVX512
        return __builtin_shufflevector(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#else
        return __builtin_shufflevector(v, v, 7, 6, 5, 4, 3, 2, 1, 0);
#endif
    }

    // The coefficients of `rows` in the span whose first position has these angles. Reads and writes up to 16 numbers
    // beyond the dims.
    QAQ_NOINLINE void weigh(const float* angle, const float* coefficients, float* weights) const {
        const int half = this->half;
        for (int begin = 0; begin < half; begin += WIDE) {
            const int i = std::max(0, std::min(begin, half - WIDE));  // the last vector may overlap the one before
            const wide c = at(angle + i), s = at(angle + half + i);
            const wide a = at(coefficients + i), b = at(coefficients + half + i);
            put(weights + i, a * c + b * s);
            put(weights + half + i, b * c - a * s);
        }
        for (int i = dim; i < dim + 16; i += 8) store(weights + i, f8{});
        wide sums[2 * PAIRS];
#pragma GCC unroll 8
        for (int k = 0; k < 2 * PAIRS; ++k) sums[k] = wide{};
        for (int i = fast / WIDE * WIDE; i < half; i += WIDE) {
            const float* node = nodes.data() + i * 2 * PAIRS;
            const wide a = at(weights + i), b = at(weights + half + i);
#pragma GCC unroll 4
            for (int k = 0; k < PAIRS; ++k) {
                sums[k] += a * at(node + k * WIDE);
                sums[PAIRS + k] += b * at(node + (PAIRS + k) * WIDE);
            }
        }
        store(weights + dim, totals(sums));
    }

    // Sums the rows; a lane is a position.
    template <int H>
    QAQ_NOINLINE void add_up(const float* weights, int64_t step, float* scores, int64_t stride) const {
        constexpr int VECTORS = 2;
        for (int x = 0; x < HALF_SPAN; x += VECTORS * WIDE) {
            wide even[H][VECTORS] = {}, odd[H][VECTORS] = {};
            const auto add = [&](int first, int second, int count) {
                for (int r = 0; r < count; ++r)
                    for (int i = 0; i < VECTORS; ++i) {
                        const wide cosines = at(rows.data() + (first + r) * HALF_SPAN + x + WIDE * i);
                        const wide sines = at(rows.data() + (second + r) * HALF_SPAN + x + WIDE * i);
                        for (int h = 0; h < H; ++h) {
                            even[h][i] += weights[h * step + first + r] * cosines;
                            odd[h][i] += weights[h * step + second + r] * sines;
                        }
                    }
            };
            add(0, half, fast), add(dim, dim + PAIRS, PAIRS);
            for (int h = 0; h < H; ++h)
                for (int i = 0; i < VECTORS; ++i) {
                    float* middle = scores + h * stride + HALF_SPAN;
                    put(middle + x + WIDE * i, even[h][i] + odd[h][i]);
                    put(middle - x - WIDE * (i + 1), reversed(even[h][i] - odd[h][i]));
                }
        }
    }
};

}  // namespace
QAQ_END_TARGET
