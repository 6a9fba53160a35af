// Tiles of codes, transposed so that a lane is a row, and unpacked to 16-bit levels.
#pragma once
#define QAQ_AVX2

#include <cstdint>

#include "code_levels_avx2.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

// The row at place p of a transposed half tile, such that unpacking restores the order of rows: bytes of levels to
// pairs of dims (four rows in each half of a vector), or to single dims (eight rows).
constexpr int row_of_pairs(int p) { return (p & 3) | (p << 1 & 24) | (p >> 2 & 4); }
constexpr int row_of_slots(int p) { return (p & 7) | (p << 1 & 16) | (p >> 1 & 8); }

// The levels of 32 rows of one octet of B planes, for products with queries: four vectors for every two slots, whose
// levels alternate.
template <int B>
QAQ_NOINLINE void unpack_pairs(const __m256i* units, const uint8_t* place, const LevelTables& tables, __m256i* out,
                               int step) {
    __m256i low[8], high[8];
    look_up<B>(units, place, tables, [&](int slot, __m256i l, __m256i h) { low[slot] = l, high[slot] = h; });
    for (int i = 0; i < 8; i += 2, out += step) {
        const __m256i a = _mm256_unpacklo_epi8(low[i], high[i]), b = _mm256_unpackhi_epi8(low[i], high[i]),
                      c = _mm256_unpacklo_epi8(low[i + 1], high[i + 1]),
                      d = _mm256_unpackhi_epi8(low[i + 1], high[i + 1]);
        _mm256_store_si256(out, _mm256_unpacklo_epi16(a, c));
        _mm256_store_si256(out + 1, _mm256_unpackhi_epi16(a, c));
        _mm256_store_si256(out + 2, _mm256_unpacklo_epi16(b, d));
        _mm256_store_si256(out + 3, _mm256_unpackhi_epi16(b, d));
    }
}

// The same for products with weights: two vectors for each slot, `step` apart.
template <int B>
QAQ_NOINLINE void unpack_slots(const __m256i* units, const uint8_t* place, const LevelTables& tables, __m256i* out,
                               int step) {
    look_up<B>(units, place, tables, [&](int slot, __m256i l, __m256i h) {
        _mm256_store_si256(out + slot * step, _mm256_unpacklo_epi8(l, h));
        _mm256_store_si256(out + slot * step + 1, _mm256_unpackhi_epi8(l, h));
    });
}

using Unpack = void(const __m256i*, const uint8_t*, const LevelTables&, __m256i*, int);
constexpr Unpack* PAIRS[9] = {nullptr,         unpack_pairs<1>, unpack_pairs<2>, unpack_pairs<3>, unpack_pairs<4>,
                              unpack_pairs<5>, unpack_pairs<6>, unpack_pairs<7>, unpack_pairs<8>};
constexpr Unpack* SLOTS[9] = {nullptr,         unpack_slots<1>, unpack_slots<2>, unpack_slots<3>, unpack_slots<4>,
                              unpack_slots<5>, unpack_slots<6>, unpack_slots<7>, unpack_slots<8>};

// units[u]: unit u of 32 rows of `size` bytes, in the order ROW. Reads up to 15 bytes beyond the last row.
template <int ROW(int)>
QAQ_NOINLINE void transpose(const uint8_t* rows, int64_t size, __m256i* units) {
    for (int u = 0; u < size; u += 16) {
        __m256i a[16], b[16];
        for (int i = 0; i < 16; ++i) {
            const auto row = [&](int p) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + ROW(p) * size + u));
            };
            a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(i + 16), 1);
        }
        const auto shuffle = [](const __m256i* from, __m256i* to) {
            for (int i = 0; i < 8; ++i) {
                to[2 * i] = _mm256_unpacklo_epi8(from[i], from[i + 8]);
                to[2 * i + 1] = _mm256_unpackhi_epi8(from[i], from[i + 8]);
            }
        };
        shuffle(a, b), shuffle(b, a), shuffle(a, b), shuffle(b, a);
        for (int i = 0; i < 16; ++i) _mm256_store_si256(units + u + i, a[i]);
    }
}

}  // namespace
QAQ_END_TARGET
