// Scores of rows of codes with AVX-512. Sixteen rows are transposed so that a lane has four dims of one row. Products
// of unsigned levels with signed queries are summed in 32 bits. A query is an integer of two signed bytes.
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

constexpr int PAIR = 32;  // rows that are scored together
constexpr float MOST =
    127 << 8;  // the largest query or weight: its low byte is signed, so the high byte has no room for more

// Queries as integers for the levels of one width: times the step of each dim's grid.
struct QueryCodes {
    int heads = 0, dwords = 0, split = 0;  // dwords: of four dims each; split: those before the split
    Buffer<int32_t> high, low;             // [heads][dwords]
    Buffer<float> units, shifts;  // [heads], the score of integer 1 times k = 1; [2][heads], of the query times k = 0

    void quantize(const HeadOfLayer& of, const RowReader& reader, const Layout& layout, const Levels& levels) {
        const Grid& grid = levels.grids[reader.k_bytes - 1];
        heads = of.layer.group, dwords = 2 * layout.octets, split = 2 * layout.split;
        grow(high, size_t(heads) * dwords), grow(low, size_t(heads) * dwords);
        grow(units, heads), grow(shifts, size_t(2) * heads);
        alignas(64) float steps[MAX_DIM], lowest[MAX_DIM], wide[MAX_DIM];
        for (int d = 0; d < of.layer.dim; ++d) {
            const int planes = reader.slices[d / SLICE].planes[d % SLICE / 8];
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
            units[g] = all - all + unit;  // the sum passes NaN and infinity on
            __m512 first = _mm512_setzero_ps(), rest = first;
            for (int d = 0; d < of.layer.dim; d += 16) {
                const __m512i whole = _mm512_cvtps_epi32(load16(wide + d) * _mm512_set1_ps(share));
                // The part of the score that comes from the dim's lowest level.
                const __m512 step = load16(steps + d);
                const __m512 lowest_part =
                    _mm512_maskz_div_ps(_mm512_cmp_ps_mask(step, _mm512_setzero_ps(), _CMP_GT_OQ), load16(lowest + d),
                                        step) *
                    _mm512_cvtepi32_ps(whole);
                const __mmask16 before = first_of_16(8 * layout.split - d);
                first += _mm512_maskz_mov_ps(before, lowest_part),
                    rest += _mm512_maskz_mov_ps(__mmask16(~before), lowest_part);
                const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
                const size_t at = size_t(g) * dwords + d / 4;
                _mm_storeu_si128(reinterpret_cast<__m128i*>(high.data() + at), _mm512_cvtepi32_epi8(upper));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(low.data() + at), _mm512_cvtepi32_epi8(whole));
            }
            shifts[g] = _mm512_reduce_add_ps(first), shifts[heads + g] = _mm512_reduce_add_ps(rest);
        }
    }
};

// Transposes 16 x 16 lanes of four bytes.
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
    // v[4i + j]: in quarter q, column 4q + j of rows 4i to 4i + 3
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

struct KeyScores {
    QueryCodes of_width[QAQ_WIDTHS];
    __m512i k[2][MAX_DIM / 4][2];  // low bytes, high bytes; four dims each; the first and the second sixteen rows

    // by_row[g * step + i]: the scores of a run of rows.
    void score(const RowReader& reader, const Levels& levels, const WidthRun& run, const float* first,
               const float* rest, float* by_row, int64_t step) {
        const QueryCodes& queries = of_width[run.index];
        for (int i = 0; i < run.n; i += PAIR) {
            const uint8_t* rows = run.rows + int64_t(i) * reader.bytes;
            const auto read = reader.k_bytes == 1 ? read_half<1> : read_half<2>;
            for (int half = 0; half < (run.n - i > 16 ? 2 : 1); ++half)
                read(*this, reader, levels, rows + int64_t(16) * half * reader.bytes, run.n - i - 16 * half, half);
            for (int g = 0; g < queries.heads;) {
                const int some = std::min(6, queries.heads - g);
                constexpr decltype(&KeyScores::multiply<1>) BY_HEADS[] = {
                    &KeyScores::multiply<1>, &KeyScores::multiply<2>, &KeyScores::multiply<3>,
                    &KeyScores::multiply<4>, &KeyScores::multiply<5>, &KeyScores::multiply<6>};
                const auto multiply = BY_HEADS[some - 1];
                (this->*multiply)(queries, g, reader.k_bytes, first + i, rest + i, by_row + g * step + i, step);
                g += some;
            }
        }
    }

  private:
    template <int K>
    QAQ_NOINLINE static void read_half(KeyScores& self, const RowReader& reader, const Levels& levels,
                                       const uint8_t* rows, int n, int half) {
        for (int s = 0; s < reader.count; ++s) {
            __m512i found[K][16];
            reader.read<K, 16>(levels, s, rows, n, [&](int i, int k, __m512i bytes) { found[k][i] = bytes; });
            for (int k = 0; k < K; ++k) {
                transpose(found[k]);
#pragma GCC unroll 16
                for (int c = 0; c < 16; ++c) self.k[k][16 * s + c][half] = found[k][c];
            }
        }
    }

    template <int H>
    QAQ_NOINLINE void multiply(const QueryCodes& queries, int g, int bytes, const float* first, const float* rest,
                               float* by_row, int64_t step) const {
        const int32_t *high = queries.high.data() + g * queries.dwords, *low = queries.low.data() + g * queries.dwords;
        __m512 total[H][2];
#pragma GCC unroll 6
        for (int h = 0; h < H; ++h) total[h][0] = total[h][1] = _mm512_setzero_ps();
        for (int part = 0; part < 2; ++part) {
            const int begin = part ? queries.split : 0, end = part ? queries.dwords : queries.split;
            const float *scales = part ? rest : first, *shifts = queries.shifts.data() + part * queries.heads + g;
            float place = 1;
            for (int b = 0; b < bytes; ++b, place *= 256) {
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
                        // The lowest levels' part is added to the largest sums, which loses the least to rounding.
                        const float shift = b == bytes - 1 ? shifts[h] / place : 0.0f;
                        total[h][v] += (sum + shift) * (load16(scales + 16 * v) * place);
                    }
            }
        }
#pragma GCC unroll 6
        for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) store16(by_row + h * step + 16 * v, total[h][v] * queries.units[g + h]);
    }
};

}  // namespace
QAQ_END_TARGET
