// Levels of codes with AVX2: shuffles of bytes look up the levels of a dim, as 16-bit integers, for 32 rows at once.
#pragma once
#define QAQ_AVX2

#include <algorithm>
#include <cstdint>

#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

// Integers of 16 bits, chosen so that sums of products fit 32 bits and results are within 1e-3 of float arithmetic.
constexpr int KEY_LEVELS = 32767;    // the largest level of keys: an error in a score multiplies the token's weight
constexpr int VALUE_LEVELS = 16383;  // the largest level of values, which leaves more bits to the weights
constexpr float MOST = 32767;        // the largest query or weight
constexpr int CHUNK = 2;             // octets whose products are summed as integers
constexpr float SUM_MOST = 2.1e9f;   // the largest sum, below 2^31 by more than roundings add up to

// Bits of the fields in which codes of a number of planes are joined.
constexpr int field_bits(int planes) { return planes <= 2 ? planes : planes <= 4 ? 4 : 8; }

// An octet's 8 dims are looked up in 8 slots. The dim of a slot:
constexpr int dim_at(int bits, int slot) {
    return bits == 2 ? slot / 4 + slot % 4 * 2 : bits == 4 ? slot / 2 + slot % 2 * 4 : slot;
}

// The slots of dims 0 to 7.
inline __m256i order_of(int bits) {
    return bits == 2   ? _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)
           : bits == 4 ? _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)
                       : _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
}

// Levels as integers, in tables for shuffles, which index 16 bytes by a nibble.
struct LevelTables {
    static constexpr int FIRST[10] = {0, 0, 4, 6, 7, 8, 10, 14, 22, 38};
    __m256i low[38], high[38];  // bytes of 16 levels, twice
    float unit;                 // the level of integer 1

    // Up to 4 planes: table j is for the nibble's j-th field. More planes: table j is for codes from 16·j on.
    void prepare(const float* levels, int largest) {
        f8 most = {};
        for (int i = 256; i < 9 * 256; i += 8) {
            const f8 x = load(levels + i), size = x < 0 ? -x : x;
            most = size > most ? size : most;
        }
        unit = 0;
        for (int i = 0; i < 8; ++i) unit = std::max(unit, most[i] / largest);
        for (int planes = 1; planes <= 8; ++planes) {
            const int bits = field_bits(planes), mask = (1 << planes) - 1;
            for (int j = 0; j < FIRST[planes + 1] - FIRST[planes]; ++j) {
                float sixteen[16];
                for (int i = 0; i < 16; ++i)
                    sixteen[i] = levels[256 * planes + (planes > 4 ? 16 * j + i : i >> (bits * j) & mask)];
                put(FIRST[planes] + j, sixteen);
            }
        }
    }

  private:
    void put(int table, const float* levels) {
        const f8 share = splat(1.0f / unit);
        const __m256i a = _mm256_cvtps_epi32((__m256)(load(levels) * share)),
                      b = _mm256_cvtps_epi32((__m256)(load(levels + 8) * share)),
                      both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8),
                      bytes = _mm256_packus_epi16(_mm256_and_si256(both, _mm256_set1_epi16(255)),
                                                  _mm256_srli_epi16(both, 8));
        low[table] = _mm256_permute4x64_epi64(bytes, 0x88);
        high[table] = _mm256_permute4x64_epi64(bytes, 0xdd);
    }
};

// Fields of `BITS` bits, `high` above `low`, as fields twice as wide: first those at even places, then those at odd
// ones.
template <int BITS>
inline void join(__m256i high, __m256i low, __m256i& even, __m256i& odd) {
    const __m256i mask = _mm256_set1_epi8(BITS == 1 ? 0x55 : BITS == 2 ? 0x33 : 0x0f);
    even = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(high, mask), BITS), _mm256_and_si256(low, mask));
    odd = _mm256_or_si256(_mm256_andnot_si256(mask, high), _mm256_srli_epi16(_mm256_andnot_si256(mask, low), BITS));
}

// Joins the B planes of one octet of 32 rows to codes: fields[r] holds dims r, r+S, ….
template <int B, int S>
inline void read_fields(const __m256i* units, const uint8_t* place, __m256i* fields) {
    const auto plane = [&](int bit) {  // bit 0 is the last plane
        return bit < B ? _mm256_load_si256(units + place[B - 1 - bit]) : _mm256_setzero_si256();
    };
    if constexpr (S == 1) fields[0] = plane(0);
    if constexpr (S == 2) join<1>(plane(1), plane(0), fields[0], fields[1]);
    if constexpr (S >= 4) {
        __m256i quads[S / 4][4];
        for (int h = 0; h < S / 4; ++h) {
            __m256i low[2], high[2];
            join<1>(plane(4 * h + 1), plane(4 * h), low[0], low[1]);
            join<1>(plane(4 * h + 3), plane(4 * h + 2), high[0], high[1]);
            for (int r = 0; r < 2; ++r) join<2>(high[r], low[r], quads[h][r], quads[h][r + 2]);
        }
        for (int r = 0; r < 4; ++r) {
            if constexpr (S == 4) fields[r] = quads[0][r];
            if constexpr (S == 8) join<4>(quads[1][r], quads[0][r], fields[r], fields[r + 4]);
        }
    }
}

// Looks up codes of BITS bits: the upper bits choose one of 2^(BITS-4) tables, `index`, the low nibble, an entry.
template <int BITS>
inline __m256i choose(const __m256i* tables, __m256i code, __m256i index) {
    if constexpr (BITS == 4) {
        return _mm256_shuffle_epi8(*tables, index);
    } else {
        return _mm256_blendv_epi8(choose<BITS - 1>(tables, code, index),
                                  choose<BITS - 1>(tables + (1 << (BITS - 5)), code, index),
                                  _mm256_slli_epi16(code, 8 - BITS));
    }
}

// Calls visit(slot, low bytes, high bytes) with the levels of 32 rows, for an octet's 8 slots.
template <int B, typename Visit>
inline void look_up(const __m256i* units, const uint8_t* place, const LevelTables& tables, Visit visit) {
    constexpr int S = field_bits(B), FIRST = LevelTables::FIRST[B], PARTS = LevelTables::FIRST[B + 1] - FIRST;
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i fields[S];
    read_fields<B, S>(units, place, fields);
    int slot = 0;
    for (int r = 0; r < S; ++r) {
        if constexpr (B <= 4) {
            for (int half = 0; half < 2; ++half) {
                const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(fields[r], 4) : fields[r], nibble);
                for (int j = 0; j < PARTS; ++j, ++slot)
                    visit(slot, _mm256_shuffle_epi8(tables.low[FIRST + j], index),
                          _mm256_shuffle_epi8(tables.high[FIRST + j], index));
            }
        } else {
            const __m256i index = _mm256_and_si256(fields[r], nibble);
            visit(slot++, choose<B>(tables.low + FIRST, fields[r], index),
                  choose<B>(tables.high + FIRST, fields[r], index));
        }
    }
}

}  // namespace
QAQ_END_TARGET
