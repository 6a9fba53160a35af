// A block's rows grouped by width, in the order of the pool, and the way between this order and that of positions.
//
// A width has a mask of its positions. Compressing and expanding with the mask moves numbers between the orders,
// sixteen at a time. An array "by row" has a number for every row of the block, in pool order, with padding after each
// width.
#pragma once
#define QAQ_AVX512

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.h"
#include "head.h"
#include "levels_avx512.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline void store16(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
inline __mmask16 first_of_16(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1 << std::max(n, 0)) - 1); }
inline __mmask64 first_of_64(int n) { return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1; }
inline int whole_tiles(int n) { return (n + TILE - 1) / TILE * TILE; }

// The rows of one width.
struct WidthRun {
    int index, n;
    int begin;  // in arrays by row; at least 16 numbers of padding follow, up to a multiple of TILE
    const uint8_t* rows;
    const uint16_t *masks, *ranks;  // of sixteen positions each: those of this width, and rows before them
};

// Looks up a side's scales by their meta bytes.
struct Scales {
    bool by_nibbles;  // the first scale by the low four bits of the meta byte, the other by the high ones
    __m512 first, rest;

    explicit Scales(const QaqSide& side) : by_nibbles(side.meta && side.parts == 2) {
        if (!by_nibbles) return;
        const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        first = _mm512_i32gather_ps(_mm512_slli_epi32(each, 1), side.scales, 4);
        rest = _mm512_i32gather_ps(_mm512_slli_epi32(each, 5), side.scales + 1, 4);
        const __m512i both = _mm512_srli_epi32(each, 1);  // eight pairs, alternating
        for (int meta = 0; meta < 256 && by_nibbles; meta += 8) {
            const __m512i low = _mm512_add_epi32(both, _mm512_set1_epi32(meta));
            const __m512 expected =
                _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(low, first), 0xaaaa, _mm512_srli_epi32(low, 4), rest);
            by_nibbles = _mm512_cmp_ps_mask(expected, load16(side.scales + 2 * meta), _CMP_EQ_OQ) == 0xffff;
        }
    }

    // The scales of n meta bytes. Writes up to a multiple of 16 numbers.
    void look_up(const QaqSide& side, const uint8_t* metas, int n, float* low, float* high) const {
        for (int i = 0; i < n; i += 16) {
            const __m128i bytes = _mm_maskz_loadu_epi8(first_of_16(n - i), metas + i);
            const __m512i meta = _mm512_cvtepu8_epi32(bytes);
            if (by_nibbles) {
                store16(low + i, _mm512_permutexvar_ps(meta, first));
                store16(high + i, _mm512_permutexvar_ps(_mm512_srli_epi32(meta, 4), rest));
            } else {
                const __m512i at = _mm512_mullo_epi32(meta, _mm512_set1_epi32(side.parts));
                store16(low + i, _mm512_i32gather_ps(at, side.scales, 4));
                store16(high + i, _mm512_i32gather_ps(at, side.scales + side.parts - 1, 4));
            }
        }
    }
};

struct RowsByWidth {
    int tokens = 0, count = 0, padded = 0;  // count: runs; padded: size of an array by row
    WidthRun runs[QAQ_WIDTHS];
    Buffer<uint16_t> masks, ranks;
    Buffer<uint8_t> metas;  // by row
    Buffer<float> scales;   // twice by row: of the octets before the split, of the others

    // Takes the keys (shift 0) or values (shift 4) of n tokens from `begin` on. Rows of width 0 are left out.
    void group(const HeadOfLayer& of, int shift, const Layout& layout, const Scales& table, int block, int begin,
               int n) {
        const QaqSide& side = shift ? of.layer.value : of.layer.key;
        const uint8_t* tags = of.layer.tags + of.head * of.layer.tags_head_stride + begin;
        const int words = (n + 63) / 64;
        tokens = n, count = padded = 0;
        grow(masks, size_t(QAQ_WIDTHS) * words * 4), grow(ranks, size_t(QAQ_WIDTHS) * words * 4);
        const __m512i nibble = _mm512_set1_epi8(char(15 << shift));
        for (int index = 1; index < QAQ_WIDTHS; ++index) {
            if (!side.rows[block].base[index]) continue;
            const __m512i want = _mm512_set1_epi8(char(index << shift));
            uint16_t *mask = masks.data() + size_t(count) * words * 4, *rank = ranks.data() + size_t(count) * words * 4;
            int found = 0;
            for (int w = 0; w < words; ++w) {
                const __mmask64 valid = first_of_64(n - 64 * w);
                const __m512i tag = _mm512_maskz_loadu_epi8(valid, tags + 64 * w);
                const uint64_t here = _mm512_mask_cmpeq_epi8_mask(valid, _mm512_and_si512(tag, nibble), want);
                std::memcpy(mask + 4 * w, &here, 8);
                for (int i = 0; i < 4; ++i) {
                    rank[4 * w + i] = uint16_t(found);
                    found += __builtin_popcount(uint16_t(here >> (16 * i)));
                }
            }
            if (!found) continue;
            const int64_t before = side.rows[block].first[of.head * QAQ_WIDTHS + index];
            const uint8_t* rows = side.rows[block].base[index] + before * layout.row_bytes(index);
            for (int at = 0; at < std::min(AHEAD, found * layout.row_bytes(index)); at += 64)
                _mm_prefetch(reinterpret_cast<const char*>(rows + at), _MM_HINT_T0);
            runs[count++] = WidthRun{index, found, padded, rows, mask, rank};
            padded += whole_tiles(found + 16);
        }
        grow(metas, size_t(padded) + 64), grow(scales, size_t(2) * padded);
        find_scales(side, table, of.head * side.affine_head_stride + begin);
    }

    const float* scale(int part) const { return scales.data() + size_t(part) * padded; }

    // From H arrays by row, `step` apart, to positions t to t + 15; 0 where there is no row.
    template <int H>
    inline void expand(const float* by_row, int64_t step, int t, __m512* numbers) const {
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) numbers[h] = _mm512_setzero_ps();
        for (const WidthRun *run = runs, *end = runs + count; run < end; ++run) {
            const __mmask16 mask = run->masks[t / 16];
            const float* from = by_row + run->begin + run->ranks[t / 16];
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) numbers[h] = _mm512_mask_expand_ps(numbers[h], mask, load16(from + h * step));
        }
    }

    // From positions t to t + 15 to H arrays by row. Up to 16 numbers after each run become 0.
    template <int H>
    inline void compress(const __m512* numbers, int t, float* by_row, int64_t step) const {
        for (const WidthRun *run = runs, *end = runs + count; run < end; ++run) {
            const __mmask16 mask = run->masks[t / 16];
            float* to = by_row + run->begin + run->ranks[t / 16];
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) store16(to + h * step, _mm512_maskz_compress_ps(mask, numbers[h]));
        }
    }

  private:
    void find_scales(const QaqSide& side, const Scales& table, int64_t at) {
        float *low = scales.data(), *high = low + padded;
        for (int i = 0; i < count; ++i) {
            const WidthRun& run = runs[i];
            if (!side.meta) {
                compress_scales(side, at, run, low + run.begin, high + run.begin);
                continue;
            }
            uint8_t* mine = metas.data() + run.begin;
            for (int t = 0; t < tokens; t += 64) {
                uint64_t mask;
                std::memcpy(&mask, run.masks + t / 16, 8);
                const __m512i meta = _mm512_maskz_loadu_epi8(first_of_64(tokens - t), side.meta + at + t);
                _mm512_storeu_si512(mine + run.ranks[t / 16], _mm512_maskz_compress_epi8(mask, meta));
            }
            table.look_up(side, mine, run.n, low + run.begin, high + run.begin);
        }
    }

    void compress_scales(const QaqSide& side, int64_t at, const WidthRun& run, float* low, float* high) const {
        for (int t = 0; t < tokens; ++t) {
            if (!(run.masks[t / 16] >> t % 16 & 1)) continue;
            const float* scale = side.scale + (at + t) * side.parts;
            *low++ = scale[0], *high++ = scale[side.parts - 1];
        }
    }
};

}  // namespace
QAQ_END_TARGET
