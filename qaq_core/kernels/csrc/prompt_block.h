// Attention of a block of a prompt's queries of one KV head, a tile of tokens at a time.
//
// A lane is a query: scores and weights of a tile are [tokens][lanes], outputs [dim][lanes], so that the highest score,
// the sum of weights and the mask need no sums across lanes. Tokens behind the block's last query are not computed. If
// shares are observed, the weights of all tiles are kept until the sums of the queries are known.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "buffer.h"
#include "half.h"
#include "products.h"
#include "prompt_kernels.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int BLOCK_VECTORS = 3, KEYS = 64;
constexpr float LOWEST = -1e30f;  // below every score; finite, as a difference of infinities is none

typedef int32_t wide_int __attribute__((vector_size(4 * WIDE)));

inline wide splat_wide(float x) { return wide{} + x; }

// 2^x for x <= 0, with a relative error below 2e-7.
inline wide power_of_two(wide x) {
    const wide lowest = splat_wide(-126.0f), shifter = splat_wide(12582912.0f);
    x = x < lowest ? lowest : x;  // keeps NaN
    const wide shifted = x + shifter, f = x - (shifted - shifter);
    wide p = f * 1.3264727e-3f + 9.671512645e-3f;
    p = p * f + 5.550733743e-2f;
    p = p * f + 2.4022242085e-1f;
    p = p * f + 6.931469776e-1f;
    p = p * f + 1.0f;
    return p * (wide)(((wide_int)shifted << 23) + 0x3F800000);
}

inline wide_int first_lanes() {
    wide_int lanes{};
    for (int i = 0; i < WIDE; ++i) lanes[i] = i;
    return lanes;
}

struct Higher {
    template <typename V>
    V operator()(V a, V b) const {
        return ((b > a) | (b != b)) ? b : a;  // keeps NaN
    }
};

struct Plus {
    template <typename V>
    V operator()(V a, V b) const {
        return a + b;
    }
};

// Element i: the elements of vector i, joined.
template <typename Join>
inline f8 join_each(const f8* v, Join join) {
    f8 pairs[4], fours[2];
    for (int i = 0; i < 4; ++i)
        pairs[i] = join(__builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14),
                        __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15));
    for (int i = 0; i < 2; ++i)
        fours[i] = join(__builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13),
                        __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15));
    return join(__builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11),
                __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15));
}

template <typename Join>
inline f8 halves(wide v, Join join) {
#ifdef QAQ_AVX512
    return join((f8)_mm512_castps512_ps256((__m512)v), (f8)_mm512_extractf32x8_ps((__m512)v, 1));
#else
    return v;
#endif
}

// Scratch memory of one thread, kept from call to call.
struct BlockScratch {
    Buffer<float> query, output;     // [group][dim][lanes]
    Buffer<float> weights, highest;  // [tiles][group][KEYS][lanes] and [tiles][group][lanes], or of one tile
    Buffer<float> peak, sum, scale;  // [group][lanes], of a query's scores and weights
    Buffer<float> row;               // [dim]
};

// N vectors of queries.
template <int N>
struct PromptBlock {
    static constexpr int LANES = N * WIDE;

    const QaqPrompt& prompt;
    const QaqLayer& layer;
    PromptRows rows;
    PromptShares shares;
    BlockScratch& scratch;
    int head, first, count, position;  // queries; position: of the first

    int dim() const { return layer.dim; }
    int group() const { return layer.group; }
    bool observed() const { return shares.sums || shares.peaks; }
    int end() const { return position + count; }
    int begin() const { return prompt.window ? std::max(0, position - prompt.window + 1) / KEYS * KEYS : 0; }
    float* query(int g) const { return scratch.query.data() + int64_t(g) * dim() * LANES; }
    float* output(int g) const { return scratch.output.data() + int64_t(g) * dim() * LANES; }
    int64_t place(int tile, int g) const { return int64_t(observed() ? tile : 0) * group() + g; }
    float* weights(int tile, int g) const { return scratch.weights.data() + place(tile, g) * KEYS * LANES; }
    float* highest(int tile, int g) const { return scratch.highest.data() + place(tile, g) * LANES; }
    float* peak(int g) const { return scratch.peak.data() + g * LANES; }
    float* sum(int g) const { return scratch.sum.data() + g * LANES; }
    float* scale(int g) const { return scratch.scale.data() + g * LANES; }
    wide_int positions(int n) const { return first_lanes() + (position + n * WIDE); }

    void prepare() const {
        const size_t area = size_t(group()) * LANES, tiles = observed() ? (end() - begin() + KEYS - 1) / KEYS : 1;
        grow(scratch.query, area * dim()), grow(scratch.output, area * dim());
        grow(scratch.weights, tiles * area * KEYS), grow(scratch.highest, tiles * area);
        grow(scratch.peak, area), grow(scratch.sum, area), grow(scratch.scale, area), grow(scratch.row, size_t(dim()));
        std::fill_n(scratch.output.data(), area * dim(), 0.0f);
        std::fill_n(scratch.query.data(), area * dim(), 0.0f);
        std::fill_n(scratch.peak.data(), area, LOWEST);
        std::fill_n(scratch.sum.data(), area, 0.0f);
        const int size = bytes_of(prompt.type);
        const float factor = float(prompt.scaling * 1.4426950408889634);  // scores are exponents of 2
        float* row = scratch.row.data();
        for (int g = 0; g < group(); ++g)
            for (int i = 0; i < count; ++i) {
                const int64_t at =
                    (int64_t(head) * group() + g) * prompt.head_stride + (first + i) * prompt.query_stride;
                to_floats(prompt.type, static_cast<const uint8_t*>(prompt.query) + at * size, dim(), row);
                for (int d = 0; d < dim(); ++d) query(g)[d * LANES + i] = row[d] * factor;
            }
    }

    // Hides what a query does not see of n tokens from position t on.
    void mask(float* scores, int t, int n) const {
        const wide hidden = splat_wide(-std::numeric_limits<float>::infinity());
        for (int k = 0; k < n; ++k)
            for (int i = 0; i < N; ++i) {
                wide_int seen = positions(i) >= t + k;
                if (prompt.window) seen &= positions(i) - prompt.window < t + k;
                float* at = scores + k * LANES + i * WIDE;
                store_wide(at, seen ? load_wide(at) : hidden);
            }
    }

    // Replaces scores by weights relative to the highest score so far; returns in `scale` what earlier ones change by.
    QAQ_NOINLINE void weigh(float* scores, int n, bool masked, float* peak, float* sum, float* scale) const {
        wide before[N], high[N], sums[N];
        for (int i = 0; i < N; ++i) before[i] = high[i] = load_wide(peak + i * WIDE), sums[i] = wide{};
        for (int k = 0; k < n; ++k)
            for (int i = 0; i < N; ++i) {
                const wide s = load_wide(scores + k * LANES + i * WIDE);
                high[i] = s > high[i] ? s : high[i];
            }
        for (int k = 0; k < n; ++k)
            for (int i = 0; i < N; ++i) {
                float* at = scores + k * LANES + i * WIDE;
                const wide s = load_wide(at);
                wide e = power_of_two(s - high[i]);
                if (masked) e = s < splat_wide(LOWEST) ? wide{} : e;
                sums[i] += e;
                store_wide(at, e);
            }
        for (int i = 0; i < N; ++i) {
            const wide by = power_of_two(before[i] - high[i]);
            store_wide(scale + i * WIDE, by);
            store_wide(peak + i * WIDE, high[i]);
            store_wide(sum + i * WIDE, load_wide(sum + i * WIDE) * by + sums[i]);
        }
    }

    void attend() const {
        for (int t = begin(), tile = 0; t < end(); t += KEYS, ++tile) {
            const int n = std::min(KEYS, end() - t);
            const bool masked = t + n - 1 > position || (prompt.window && t <= end() - 1 - prompt.window);
            for (int g = 0; g < group(); ++g) {
                float* tiled = weights(tile, g);
                multiply<N>(Strided{rows.keys + int64_t(t) * dim(), dim(), 1}, n, query(g), LANES, dim(), tiled,
                            nullptr);
                if (masked) mask(tiled, t, n);
                weigh(tiled, n, masked, peak(g), sum(g), scale(g));
                std::copy_n(peak(g), LANES, highest(tile, g));
            }
            for (int g = 0; g < group(); ++g)
                multiply<N>(Strided{rows.values + int64_t(t) * dim(), 1, dim()}, dim(), weights(tile, g), LANES, n,
                            output(g), scale(g));
        }
    }

    void write() const {
        const int64_t stride = int64_t(layer.kv_heads) * group() * dim();
        for (int g = 0; g < group(); ++g) {
            for (int i = 0; i < LANES; i += WIDE)
                store_wide(sum(g) + i, splat_wide(1.0f) / load_wide(sum(g) + i));  // now a query's share
            float* out = prompt.out + first * stride + (int64_t(head) * group() + g) * dim();
            for (int i = 0; i < count; ++i, out += stride)
                for (int d = 0; d < dim(); ++d) out[d] = output(g)[d * LANES + i] * sum(g)[i];
        }
    }

    // Writes the shares of all tokens.
    void observe() const {
        const int summed = layer.sinks + layer.packed + layer.recent - prompt.summed;  // position of the first
        wide_int own[N];
        for (int i = 0; i < N; ++i) own[i] = positions(i) < end();
        std::vector<float> factors(size_t(group()) * LANES);
        for (int t = begin(), tile = 0; t < end(); t += KEYS, ++tile) {
            const int n = std::min(KEYS, end() - t);
            for (int g = 0; g < group(); ++g) {
                std::fill(weights(tile, g) + n * LANES, weights(tile, g) + (n + 7) / 8 * 8 * LANES, 0.0f);
                for (int i = 0; i < LANES; i += WIDE)
                    store_wide(
                        factors.data() + g * LANES + i,
                        power_of_two(load_wide(highest(tile, g) + i) - load_wide(peak(g) + i)) * load_wide(sum(g) + i));
            }
            for (int k = 0; k < n; k += 8) {
                f8 peaks[8], sums[8];
                for (int j = 0; j < 8; ++j) {
                    wide squares[N] = {};
                    for (int g = 0; g < group(); ++g)
                        for (int i = 0; i < N; ++i) {
                            const wide p = load_wide(weights(tile, g) + (k + j) * LANES + i * WIDE) *
                                           load_wide(factors.data() + g * LANES + i * WIDE);
                            squares[i] += p * p;
                        }
                    wide highest{}, total{};
                    for (int i = 0; i < N; ++i) {
                        const wide_int far = own[i] & (positions(i) - prompt.distance >= t + k + j);
                        highest = Higher()(highest, far ? squares[i] : wide{});
                        total += own[i] & (positions(i) >= summed) ? squares[i] : wide{};
                    }
                    peaks[j] = halves(highest, Higher()), sums[j] = halves(total, Plus());
                }
                if (shares.peaks) store(shares.peaks + t + k, join_each(peaks, Higher()) / float(group()));
                if (shares.sums) store(shares.sums + t + k, join_each(sums, Plus()) / float(group()));
            }
        }
    }
};

template <int N>
int attend_vectors(const QaqPrompt& prompt, const QaqLayer& layer, PromptRows rows, int head, int first, int count,
                   PromptShares shares) {
    static thread_local BlockScratch scratch;
    const int position = layer.sinks + layer.packed + layer.recent - prompt.queries + first;
    const PromptBlock<N> block{prompt, layer, rows, shares, scratch, head, first, count, position};
    block.prepare(), block.attend(), block.write();
    if (block.observed()) block.observe();
    return block.begin();
}

// See PromptKernels.
int attend_block(const QaqPrompt& prompt, const QaqLayer& layer, PromptRows rows, int head, int first, int count,
                 PromptShares shares) {
    const auto attend = count <= WIDE       ? attend_vectors<1>
                        : count <= 2 * WIDE ? attend_vectors<2>
                                            : attend_vectors<BLOCK_VECTORS>;
    return attend(prompt, layer, rows, head, first, count, shares);
}

}  // namespace
QAQ_END_TARGET
