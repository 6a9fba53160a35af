// Quads: scores and weights of four query heads at one position, contiguous, so that moving them between pool order and
// position order moves four numbers at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "layout.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int QUAD = 4;

// Conversions of eight positions between eight quads and four heads of eight numbers.
#ifdef QAQ_AVX2

inline f8 two_quads(const float* low, const float* high) {
    return (f8)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}

// heads[h * step + i] = quads(i)[h]
template <typename Quads>
inline void to_heads(Quads quads, float* heads, int step) {
    __m256 r[4];
    for (int i = 0; i < 4; ++i) r[i] = (__m256)two_quads(quads(i), quads(i + 4));
    const __m256 ab = _mm256_unpacklo_ps(r[0], r[1]), cd = _mm256_unpackhi_ps(r[0], r[1]),
                 ab2 = _mm256_unpacklo_ps(r[2], r[3]), cd2 = _mm256_unpackhi_ps(r[2], r[3]);
    const auto join = [](__m256 x, __m256 y, bool high) {
        const __m256d a = _mm256_castps_pd(x), b = _mm256_castps_pd(y);
        return (f8)_mm256_castpd_ps(high ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
    };
    store(heads, join(ab, ab2, false)), store(heads + step, join(ab, ab2, true));
    store(heads + 2 * step, join(cd, cd2, false)), store(heads + 3 * step, join(cd, cd2, true));
}

// visit(i, the quad of heads[h * step + i])
template <typename Visit>
inline void to_quads(const float* heads, int step, Visit visit) {
    const auto head = [&](int h) { return _mm256_loadu_ps(heads + h * step); };
    const __m256 ab = _mm256_unpacklo_ps(head(0), head(1)), ab2 = _mm256_unpackhi_ps(head(0), head(1)),
                 cd = _mm256_unpacklo_ps(head(2), head(3)), cd2 = _mm256_unpackhi_ps(head(2), head(3));
    const auto join = [](__m256 x, __m256 y, bool high) {
        const __m256d a = _mm256_castps_pd(x), b = _mm256_castps_pd(y);
        return _mm256_castpd_ps(high ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
    };
    const __m256 r[4] = {join(ab, cd, false), join(ab, cd, true), join(ab2, cd2, false), join(ab2, cd2, true)};
    for (int i = 0; i < 4; ++i) {
        visit(i, (f4)_mm256_castps256_ps128(r[i]));
        visit(i + 4, (f4)_mm256_extractf128_ps(r[i], 1));
    }
}

// parts[i] = pair(i)[0], parts[TILE + i] = pair(i)[other], of eight pairs
template <typename Pair>
inline void to_parts(Pair pair, int other, float* parts) {
    if (other != 1) {
        for (int i = 0; i < 8; ++i) parts[i] = pair(i)[0], parts[TILE + i] = pair(i)[other];
        return;
    }
    const auto two = [&](int i) {
        const auto one = [&](int k) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pair(k))); };
        return _mm_castsi128_ps(_mm_unpacklo_epi64(one(i), one(i + 1)));
    };
    const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(two(0)), two(4), 1),
                 b = _mm256_insertf128_ps(_mm256_castps128_ps256(two(2)), two(6), 1);
    store(parts, (f8)_mm256_shuffle_ps(a, b, 0x88)), store(parts + TILE, (f8)_mm256_shuffle_ps(a, b, 0xdd));
}

// of[b]: the positions of the bits that are set in b, ascending.
struct SetBits {
    uint8_t of[256][8];
    constexpr SetBits() : of() {
        for (int b = 0; b < 256; ++b)
            for (int i = 0, n = 0; i < 8; ++i)
                if (b >> i & 1) of[b][n++] = uint8_t(i);
    }
};
constexpr SetBits set_bits;

#else

template <typename Quads>
inline void to_heads(Quads quads, float* heads, int step) {
    for (int i = 0; i < 8; ++i)
        for (int h = 0; h < QUAD; ++h) heads[h * step + i] = quads(i)[h];
}

template <typename Visit>
inline void to_quads(const float* heads, int step, Visit visit) {
    for (int i = 0; i < 8; ++i) visit(i, f4{heads[i], heads[step + i], heads[2 * step + i], heads[3 * step + i]});
}

template <typename Pair>
inline void to_parts(Pair pair, int other, float* parts) {
    for (int i = 0; i < 8; ++i) parts[i] = pair(i)[0], parts[TILE + i] = pair(i)[other];
}

#endif

inline f8 twice(f4 quad) { return f8{quad[0], quad[1], quad[2], quad[3], quad[0], quad[1], quad[2], quad[3]}; }
inline f4 lower(f8 v) { return f4{v[0], v[1], v[2], v[3]}; }
inline f4 upper(f8 v) { return f4{v[4], v[5], v[6], v[7]}; }

// Softmax without the division: replaces scores[first..length) of a quad's heads by e^(score - the head's highest), and
// the others up to `padded`, an even number, by 0. Returns each head's sum and, in `peak`, its highest score.
QAQ_NOINLINE f4 exponentiate(float* scores, int first, int length, int padded, f4& peak) {
    const float inf = std::numeric_limits<float>::infinity();
    const int begin = first / 2 * 2;
    std::fill(scores, scores + QUAD * first, -inf);
    std::fill(scores + QUAD * length, scores + QUAD * padded, -inf);
    f8 peaks = splat(-inf), sums = {};
    for (int t = begin; t < length; t += 2) {
        const f8 s = load(scores + QUAD * t);
        peaks = s > peaks ? s : peaks;
    }
    peak = lower(peaks) > upper(peaks) ? lower(peaks) : upper(peaks);
    const f8 both = twice(peak);
    for (int t = begin; t < length; t += 2) {
        const f8 e = exp8(load(scores + QUAD * t) - both);
        sums += e;
        store(scores + QUAD * t, e);
    }
    std::fill(scores, scores + QUAD * first, 0.0f);
    std::fill(scores + QUAD * length, scores + QUAD * padded, 0.0f);
    return lower(sums) + upper(sums);
}

// The sum of n quads.
inline f4 sum(const float* quads, int n) {
    f8 sums[4] = {};
    int t = 0;
    for (; t + 8 <= n; t += 8)
        for (int i = 0; i < 4; ++i) sums[i] += load(quads + QUAD * t + 8 * i);
    const f8 all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    f4 out = lower(all) + upper(all);
    for (; t < n; ++t) out += load4(quads + QUAD * t);
    return out;
}

}  // namespace
QAQ_END_TARGET
