// The rows of a block in the order of their pools and in that of positions. For each width there is a mask of the
// positions that have it, and compressing and expanding by it moves numbers between the orders, sixteen at a time.
// A line is a number for every row of a block, in the order of pools, with room between the widths.
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
struct Run {
    int index, n;
    int begin;  // in a line; what is left up to the next multiple of TILE, 16 numbers or more, is free
    const uint8_t* rows;
    const uint16_t *masks, *ranks;  // of sixteen positions each, and rows before them
};

// How a side's scales are found.
struct Scales {
    bool by_nibbles;  // the first by the low four bits of the meta byte, the other by the high ones
    __m512 first, rest;

    explicit Scales(const QaqSide& side) : by_nibbles(side.meta && side.parts == 2) {
        if (!by_nibbles) return;
        const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        first = _mm512_i32gather_ps(_mm512_slli_epi32(each, 1), side.scales, 4);
        rest = _mm512_i32gather_ps(_mm512_slli_epi32(each, 5), side.scales + 1, 4);
        const __m512i both = _mm512_srli_epi32(each, 1);  // a part of eight pairs in turn
        for (int meta = 0; meta < 256 && by_nibbles; meta += 8) {
            const __m512i low = _mm512_add_epi32(both, _mm512_set1_epi32(meta));
            const __m512 expected = _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(low, first), 0xaaaa,
                                                               _mm512_srli_epi32(low, 4), rest);
            by_nibbles = _mm512_cmp_ps_mask(expected, load16(side.scales + 2 * meta), _CMP_EQ_OQ) == 0xffff;
        }
    }

    // Of n rows of these meta bytes; numbers follow up to a multiple of 16.
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

struct Widths {
    int tokens = 0, count = 0, line = 0;  // runs; numbers of a line
    Run runs[QAQ_WIDTHS];
    Buffer<uint16_t> masks, ranks;
    Buffer<uint8_t> metas;  // a line
    Buffer<float> scales;   // two lines, of the octets before the split and of the others

    // Takes n tokens from `begin` on, keys (shift 0) or values (shift 4). Rows that hold nothing are left out.
    void sort(const HeadOfLayer& of, int shift, const Layout& layout, const Scales& table, int block, int begin,
              int n) {
        const QaqSide& side = shift ? of.layer.value : of.layer.key;
        const uint8_t* tags = of.layer.tags + of.head * of.layer.tags_head_stride + begin;
        const int words = (n + 63) / 64;
        tokens = n, count = line = 0;
        room(masks, size_t(QAQ_WIDTHS) * words * 4), room(ranks, size_t(QAQ_WIDTHS) * words * 4);
        const __m512i nibble = _mm512_set1_epi8(char(15 << shift));
        for (int index = 1; index < QAQ_WIDTHS; ++index) {
            if (!side.rows[block].base[index]) continue;
            const __m512i want = _mm512_set1_epi8(char(index << shift));
            uint16_t *mask = masks.data() + size_t(count) * words * 4, *rank = ranks.data() + size_t(count) * words * 4;
            int found = 0;
            for (int w = 0; w < words; ++w) {
                const __mmask64 there = first_of_64(n - 64 * w);
                const __m512i tag = _mm512_maskz_loadu_epi8(there, tags + 64 * w);
                const uint64_t here = _mm512_mask_cmpeq_epi8_mask(there, _mm512_and_si512(tag, nibble), want);
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
            runs[count++] = Run{index, found, line, rows, mask, rank};
            line += whole_tiles(found + 16);
        }
        room(metas, size_t(line) + 64), room(scales, size_t(2) * line);
        find_scales(side, table, of.head * side.affine_head_stride + begin);
    }

    const float* scale(int part) const { return scales.data() + size_t(part) * line; }

    // The numbers of H lines, `step` apart, at positions t to t + 15; 0 where no row is.
    template <int H>
    inline void expand(const float* lines, int64_t step, int t, __m512* numbers) const {
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) numbers[h] = _mm512_setzero_ps();
        for (const Run *run = runs, *end = runs + count; run < end; ++run) {
            const __mmask16 mask = run->masks[t / 16];
            const float* from = lines + run->begin + run->ranks[t / 16];
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) numbers[h] = _mm512_mask_expand_ps(numbers[h], mask, load16(from + h * step));
        }
    }

    // The other way. Up to 16 numbers more are written to each run, 0 after the last one.
    template <int H>
    inline void compress(const __m512* numbers, int t, float* lines, int64_t step) const {
        for (const Run *run = runs, *end = runs + count; run < end; ++run) {
            const __mmask16 mask = run->masks[t / 16];
            float* to = lines + run->begin + run->ranks[t / 16];
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) store16(to + h * step, _mm512_maskz_compress_ps(mask, numbers[h]));
        }
    }

  private:
    void find_scales(const QaqSide& side, const Scales& table, int64_t at) {
        float *low = scales.data(), *high = low + line;
        for (int i = 0; i < count; ++i) {
            const Run& run = runs[i];
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

    void compress_scales(const QaqSide& side, int64_t at, const Run& run, float* low, float* high) const {
        for (int t = 0; t < tokens; ++t) {
            if (!(run.masks[t / 16] >> t % 16 & 1)) continue;
            const float* scale = side.scale + (at + t) * side.parts;
            *low++ = scale[0], *high++ = scale[side.parts - 1];
        }
    }
};

}  // namespace
QAQ_END_TARGET
