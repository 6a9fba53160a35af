// Scores of rows of codes with AVX-512. Sixteen rows are transposed so that a lane is a row and holds four dims of it;
// products of unsigned levels with signed queries are added up in 32 bits. A query is an integer of two signed bytes.
#pragma once
#define QAQ_AVX512

#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "head.h"
#include "levels_avx512.h"
#include "runs_avx512.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int PAIR = 32;          // rows that are scored together
constexpr float MOST = 127 << 8;  // of a query or weight: its low byte is signed, so more would not fit the high one

// Queries as they meet the levels of one width: times the step of each dim's grid.
struct Queries {
    int heads = 0, dwords = 0, split = 0;  // four dims each; those before the split
    Buffer<int32_t> high, low;        // [heads][dwords], four bytes each
    Buffer<float> units, shifts;      // [heads], worth of one integer times one step; [2][heads], where k = 0 is

    void take(const HeadOfLayer& of, const Reading& reading, const Layout& layout, const Levels& levels) {
        const Grid& grid = levels.grids[reading.k_bytes - 1];
        heads = of.layer.group, dwords = 2 * layout.octets, split = 2 * layout.split;
        room(high, size_t(heads) * dwords), room(low, size_t(heads) * dwords);
        room(units, heads), room(shifts, size_t(2) * heads);
        alignas(64) float steps[MAX_DIM], lowest[MAX_DIM], wide[MAX_DIM];
        for (int d = 0; d < of.layer.dim; ++d) {
            const int planes = reading.slices[d / SLICE].planes[d % SLICE / 8];
            steps[d] = grid.step[planes], lowest[d] = grid.lowest[planes];
        }
        for (int g = 0; g < heads; ++g) {
            const float* query = of.transformed(g);
            __m512 most = _mm512_setzero_ps(), sum = most;
            for (int d = 0; d < of.layer.dim; d += 16) {
                const __m512 q = load16(query + d) * load16(steps + d);
                most = _mm512_max_ps(most, _mm512_abs_ps(q)), sum += load16(query + d);
                store16(wide + d, q);
            }
            const float all = _mm512_reduce_add_ps(sum), unit = _mm512_reduce_max_ps(most) / MOST;
            const float share = unit > 0 ? 1 / unit : 0;
            units[g] = all - all + unit;  // NaN and infinity come out of the sum
            __m512 first = _mm512_setzero_ps(), rest = first;
            for (int d = 0; d < of.layer.dim; d += 16) {
                const __m512i whole = _mm512_cvtps_epi32(load16(wide + d) * _mm512_set1_ps(share));
                // What a dim's lowest level gives, of what the integer stands for.
                const __m512 step = load16(steps + d);
                const __m512 worth = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(step, _mm512_setzero_ps(), _CMP_GT_OQ),
                                                         load16(lowest + d), step) * _mm512_cvtepi32_ps(whole);
                const __mmask16 before = first_of_16(8 * layout.split - d);
                first += _mm512_maskz_mov_ps(before, worth), rest += _mm512_maskz_mov_ps(__mmask16(~before), worth);
                const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
                const size_t at = size_t(g) * dwords + d / 4;
                _mm_storeu_si128(reinterpret_cast<__m128i*>(high.data() + at), _mm512_cvtepi32_epi8(upper));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(low.data() + at), _mm512_cvtepi32_epi8(whole));
            }
            shifts[g] = _mm512_reduce_add_ps(first), shifts[heads + g] = _mm512_reduce_add_ps(rest);
        }
    }
};

// Lanes of four bytes: out[c], lane r, is in[r], lane c.
inline void transpose(__m512i* v) {
    __m512i w[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
    // v[4i + j]: lane quarters q of column 4q + j, of rows 4i to 4i + 3
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x44), b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xee);
        w[j] = _mm512_shuffle_i32x4(a, c, 0x88), w[4 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        w[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88), w[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = w[i];
}

struct Keys {
    Queries of_width[QAQ_WIDTHS];
    __m512i k[2][MAX_DIM / 4][2];  // bytes, low ones first; dwords of dims; of sixteen rows, and sixteen more

    // lines[g * step + i], scores of a run of rows.
    void score(const Reading& reading, const Levels& levels, const Run& run, const float* first, const float* rest,
               float* lines, int64_t step) {
        const Queries& queries = of_width[run.index];
        for (int i = 0; i < run.n; i += PAIR) {
            const uint8_t* rows = run.rows + int64_t(i) * reading.bytes;
            const auto read = reading.k_bytes == 1 ? read_half<1> : read_half<2>;
            for (int half = 0; half < (run.n - i > 16 ? 2 : 1); ++half)
                read(*this, reading, levels, rows + int64_t(16) * half * reading.bytes, run.n - i - 16 * half, half);
            for (int g = 0; g < queries.heads;) {
                const int some = std::min(6, queries.heads - g);
                constexpr decltype(&Keys::multiply<1>) BY_HEADS[] = {&Keys::multiply<1>, &Keys::multiply<2>, &Keys::multiply<3>,
                                                                     &Keys::multiply<4>, &Keys::multiply<5>, &Keys::multiply<6>};
                const auto multiply = BY_HEADS[some - 1];
                (this->*multiply)(queries, g, reading.k_bytes, first + i, rest + i, lines + g * step + i, step);
                g += some;
            }
        }
    }

  private:
    template <int K>
    QAQ_NOINLINE static void read_half(Keys& self, const Reading& reading, const Levels& levels, const uint8_t* rows, int n,
                                   int half) {
        for (int s = 0; s < reading.count; ++s) {
            __m512i found[K][16];
            reading.read<K, 16>(levels, s, rows, n, [&](int i, int k, __m512i bytes) { found[k][i] = bytes; });
            for (int k = 0; k < K; ++k) {
                transpose(found[k]);
#pragma GCC unroll 16
                for (int c = 0; c < 16; ++c) self.k[k][16 * s + c][half] = found[k][c];
            }
        }
    }

    template <int H>
    QAQ_NOINLINE void multiply(const Queries& queries, int g, int bytes, const float* first, const float* rest, float* lines,
                           int64_t step) const {
        const int32_t *high = queries.high.data() + g * queries.dwords, *low = queries.low.data() + g * queries.dwords;
        __m512 total[H][2];
#pragma GCC unroll 6
        for (int h = 0; h < H; ++h) total[h][0] = total[h][1] = _mm512_setzero_ps();
        for (int part = 0; part < 2; ++part) {
            const int begin = part ? queries.split : 0, end = part ? queries.dwords : queries.split;
            const float *scales = part ? rest : first, *shifts = queries.shifts.data() + part * queries.heads + g;
            float worth = 1;
            for (int b = 0; b < bytes; ++b, worth *= 256) {
                __m512i upper[H][2], lower[H][2];
#pragma GCC unroll 6
                for (int h = 0; h < H; ++h)
                    upper[h][0] = upper[h][1] = lower[h][0] = lower[h][1] = _mm512_setzero_si512();
                for (int c = begin; c < end; ++c) {
                    const __m512i x = k[b][c][0], y = k[b][c][1];
#pragma GCC unroll 6
                    for (int h = 0; h < H; ++h) {
                        const __m512i up = _mm512_set1_epi32(high[h * queries.dwords + c]),
                                      down = _mm512_set1_epi32(low[h * queries.dwords + c]);
                        add_products(upper[h][0], x, up);
                        add_products(upper[h][1], y, up);
                        add_products(lower[h][0], x, down);
                        add_products(lower[h][1], y, down);
                    }
                }
#pragma GCC unroll 6
                for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
                    for (int v = 0; v < 2; ++v) {
                        const __m512 sum = _mm512_cvtepi32_ps(upper[h][v]) * 256.0f + _mm512_cvtepi32_ps(lower[h][v]);
                        // What k = 0 stands for is added where the sums are largest, so that little is rounded.
                        const float shift = b == bytes - 1 ? shifts[h] / worth : 0.0f;
                        total[h][v] += (sum + shift) * (load16(scales + 16 * v) * worth);
                    }
            }
        }
#pragma GCC unroll 6
        for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) store16(lines + h * step + 16 * v, total[h][v] * queries.units[g + h]);
    }
};

}  // namespace
QAQ_END_TARGET
