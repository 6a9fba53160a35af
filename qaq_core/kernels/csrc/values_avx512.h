// Weighted sums of rows of codes with AVX-512. Four rows are interleaved byte by byte, so that a lane has one dim of
// four tokens. Products of unsigned levels with weights, integers of two signed bytes, are summed in 32 bits.
#pragma once
#define QAQ_AVX512

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "keys_avx512.h"
#include "levels_avx512.h"
#include "runs_avx512.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int FOURS = TILE / 4;       // groups of four rows in a tile
constexpr float LEAST_UNIT = 1e-30f;  // of a weight's integers

// The lanes of a slice that have the first scale: in vectors of even octets, of odd ones.
inline void lanes_before(int split, int slice, __mmask16* lanes) {
    for (int odd = 0; odd < 2; ++odd) {
        int bits = 0;
        for (int i = 0; i < 4; ++i)
            if (SLICE / 8 * slice + 2 * i + odd < split) bits |= 15 << (4 * i);
        lanes[odd] = __mmask16(bits);
    }
}

// A query head's weights of a run, times the rows' scales, as integers.
struct WeightCodes {
    Buffer<int32_t> fours;  // [tiles][2][2][FOURS]: first scale, other scale; high bytes, low bytes
    float units[2], sums[2];

    QAQ_NOINLINE void quantize(const float* weights, const float* first, const float* rest, int n) {
        grow(fours, whole_tiles(n));
        const __m512i spread = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        for (int part = 0; part < 2; ++part) {
            const float* scales = part ? rest : first;
            __m512 most = _mm512_setzero_ps();
            for (int i = 0; i < n; i += 16) {  // numbers after the rows' own are undefined
                const __mmask16 valid = first_of_16(n - i);
                most = _mm512_max_ps(
                    most, _mm512_maskz_loadu_ps(valid, weights + i) * _mm512_maskz_loadu_ps(valid, scales + i));
            }
            units[part] = std::max(_mm512_reduce_max_ps(most) / MOST, LEAST_UNIT);
            const __m512 share = _mm512_set1_ps(1 / units[part]);
            __m512i sum = _mm512_setzero_si512();
            for (int t = 0; t < n; t += TILE) {
                __m512i whole[4], words[2], high[2], low[2];
                for (int i = 0; i < 4; ++i) {
                    const __m512 weight = load16(weights + t + 16 * i) * load16(scales + t + 16 * i) * share;
                    whole[i] = _mm512_maskz_cvtps_epi32(first_of_16(n - t - 16 * i), weight);
                }
                for (int i = 0; i < 2; ++i) {
                    words[i] = _mm512_packs_epi32(whole[2 * i], whole[2 * i + 1]);
                    sum = _mm512_dpwssd_epi32(sum, words[i], _mm512_set1_epi16(1));
                    high[i] = _mm512_srai_epi16(_mm512_add_epi16(words[i], _mm512_set1_epi16(128)), 8);
                    low[i] = _mm512_and_si512(words[i], _mm512_set1_epi16(255));
                }
                int32_t* to = fours.data() + t + 2 * FOURS * part;
                _mm512_storeu_si512(to, _mm512_permutexvar_epi32(spread, _mm512_packs_epi16(high[0], high[1])));
                _mm512_storeu_si512(to + FOURS, _mm512_permutexvar_epi32(spread, _mm512_packus_epi16(low[0], low[1])));
            }
            sums[part] = float(_mm512_reduce_add_epi32(sum));
        }
    }
};

struct WeightedValues {
    // Lane 4i + l of vector j is dim 16i + 4j + l of a slice. Plain arrays, because std::vector does not align vectors.
    struct Sums {
        int32_t added[SLICES][2][2][4][16];  // low and high bytes of levels; high and low bytes of weights
        float out[SLICES][4][16];
    };
    std::vector<WeightCodes> weights;  // by query head
    std::vector<Sums> sums;
    __m512i k[2][FOURS][4];  // a slice of a tile: low bytes, high bytes

    void begin(int heads) {
        grow(weights, heads), grow(sums, heads);
        for (int g = 0; g < heads; ++g) std::memset(sums[g].out, 0, sizeof sums[g].out);
    }

    // Adds the rows of a run, weighted by by_row[g * step + i].
    void weigh(const RowReader& reader, const Levels& levels, const WidthRun& run, int split, int heads,
               const float* first, const float* rest, const float* by_row, int64_t step) {
        for (int g = 0; g < heads; ++g) {
            weights[g].quantize(by_row + g * step, first, rest, run.n);
            std::memset(sums[g].added, 0, sizeof sums[g].added[0] * reader.count);
        }
        for (int s = 0; s < reader.count; ++s) {
            __mmask16 before[2];
            lanes_before(split, s, before);
            for (int t = 0; t < run.n; t += TILE) {
                const int n = std::min(TILE, run.n - t), fours = (n + 3) / 4;
                const auto read = reader.k_bytes == 1 ? read_tile<1> : read_tile<2>;
                read(*this, reader, levels, s, run.rows + int64_t(t) * reader.bytes, n);
                for (int b = 0; b < reader.k_bytes; ++b)
                    for (int g = 0; g < heads;) {
                        const int some = heads - g == 4 ? 2 : std::min(3, heads - g);
                        const auto multiply_some = some == 3 ? multiply<3> : some == 2 ? multiply<2> : multiply<1>;
                        multiply_some(*this, before, s, b, g, t, fours);
                        g += some;
                    }
            }
            for (int g = 0; g < heads; ++g) add_up(reader, levels, before, s, g);
        }
    }

    // Writes head g's sums in the order of dims.
    void finish(int g, int dim, float* to) const {
        for (int d = 0; d < dim; d += 4) {
            std::memcpy(to + d, sums[g].out[d / SLICE][d % 16 / 4] + d % SLICE / 16 * 4, 16);
        }
    }

  private:
    template <int K>
    QAQ_NOINLINE static void read_tile(WeightedValues& self, const RowReader& reader, const Levels& levels, int s,
                                       const uint8_t* rows, int n) {
        for (int i = 0; i < n; i += 4) {
            __m512i row[K][4];
            reader.read<K, 4>(levels, s, rows + int64_t(i) * reader.bytes, n - i,
                              [&](int r, int b, __m512i bytes) { row[b][r] = bytes; });
            for (int b = 0; b < K; ++b) {
                const __m512i* r = row[b];
                const __m512i ab = _mm512_unpacklo_epi8(r[0], r[1]), ab2 = _mm512_unpackhi_epi8(r[0], r[1]),
                              cd = _mm512_unpacklo_epi8(r[2], r[3]), cd2 = _mm512_unpackhi_epi8(r[2], r[3]);
                __m512i* to = self.k[b][i / 4];
                to[0] = _mm512_unpacklo_epi16(ab, cd), to[1] = _mm512_unpackhi_epi16(ab, cd);
                to[2] = _mm512_unpacklo_epi16(ab2, cd2), to[3] = _mm512_unpackhi_epi16(ab2, cd2);
            }
        }
    }

    // Multiplies byte b of the levels of slice s with the weights of H heads from g on, in the tile whose first row is
    // t.
    template <int H>
    QAQ_NOINLINE static void multiply(WeightedValues& self, const __mmask16* before, int s, int b, int g, int t,
                                      int fours) {
        const __mmask16 even = before[0], odd = before[1];
        constexpr int REST = 2 * FOURS;
        if (even != odd)
            self.multiply_by<H>(
                [=](const int32_t* four, int j) {
                    return _mm512_mask_set1_epi32(_mm512_set1_epi32(four[REST]), j < 2 ? even : odd, *four);
                },
                s, b, g, t, fours);
        else if (even && __mmask16(~even))
            self.multiply_by<H>([=](const int32_t* four,
                                    int) { return _mm512_mask_set1_epi32(_mm512_set1_epi32(four[REST]), even, *four); },
                                s, b, g, t, fours);
        else
            self.multiply_by<H>(
                [part = even ? 0 : REST](const int32_t* four, int) { return _mm512_set1_epi32(four[part]); }, s, b, g,
                t, fours);
    }

    template <int H, typename Weight>
    inline void multiply_by(Weight weight, int s, int b, int g, int t, int fours) {
        const int32_t* four[H];
        __m512i added[H][2][4];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            four[h] = weights[g + h].fours.data() + t;
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i)
                added[h][i / 4][i % 4] = _mm512_loadu_si512(sums[g + h].added[s][b][i / 4][i % 4]);
        }
        for (int i = 0; i < fours; ++i) {
            const __m512i x[4] = {k[b][i][0], k[b][i][1], k[b][i][2], k[b][i][3]};
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
                for (int w = 0; w < 2; ++w)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) add_products(added[h][w][j], x[j], weight(four[h] + FOURS * w + i, j));
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i)
                _mm512_storeu_si512(sums[g + h].added[s][b][i / 4][i % 4], added[h][i / 4][i % 4]);
    }

    static __m512 number(const int32_t* from) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(from)); }

    void add_up(const RowReader& reader, const Levels& levels, const __mmask16* before, int s, int g) {
        const Grid& grid = levels.grids[reader.k_bytes - 1];
        for (int odd = 0; odd < 2; ++odd) {
            alignas(64) float step[16], lowest[16];
            for (int l = 0; l < 16; ++l) {
                const int planes = reader.slices[s].planes[l / 4 * 2 + odd];
                step[l] = grid.step[planes], lowest[l] = grid.lowest[planes];
            }
            const auto of_part = [&](const float* parts) {
                return _mm512_mask_blend_ps(before[odd], _mm512_set1_ps(parts[1]), _mm512_set1_ps(parts[0]));
            };
            const __m512 unit = of_part(weights[g].units), lift = load16(lowest) * of_part(weights[g].sums);
            for (int j = 2 * odd; j < 2 * odd + 2; ++j) {
                __m512 sum = _mm512_setzero_ps();
                for (int b = reader.k_bytes - 1; b >= 0; --b)
                    sum =
                        sum * 256.0f + (number(sums[g].added[s][b][0][j]) * 256.0f + number(sums[g].added[s][b][1][j]));
                store16(sums[g].out[s][j], load16(sums[g].out[s][j]) + unit * (load16(step) * sum + lift));
            }
        }
    }
};

}  // namespace
QAQ_END_TARGET
