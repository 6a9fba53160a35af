// Levels of codes with AVX-512: 64 dims of a row are read at once.
//
// A level is lowest + step · k. Where an octet has up to five planes, k is a byte, looked up by one shuffle: its index
// is the code followed by a marker bit, which tells the number of planes. Where an octet of a row has more, or a
// codec's levels are not on a grid of 256 steps, k has two bytes, from tables of 256 entries. One shuffle and one
// transposition of bits make codes of units.
#pragma once
#define QAQ_AVX512

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "layout.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int SLICE = 64;                // dims that are read together
constexpr int SLICES = MAX_DIM / SLICE;  // at most, of a row's dims and of its bytes
constexpr int BYTE_PLANES = 5;           // at most, of an index of six bits with a marker
constexpr int AHEAD = 4096;              // bytes from the row that is read to the prefetched one

// Adds to each lane the products of four unsigned bytes with four signed ones. In assembly, because with the intrinsic
// GCC 12 copies a loop's accumulators between registers.
inline void add_products(__m512i& sums, __m512i bytes, __m512i by) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(by));
}

// The grid of the levels of each number of planes, in units of the scale.
struct Grid {
    float step[9], lowest[9];
};

struct Levels {
    std::vector<float> known;  // [9][256], what the tables were built from
    Grid grids[2];             // for k of one byte, of two
    bool on_bytes;             // whether levels of up to BYTE_PLANES planes are on a grid of bytes
    __m512i byte;              // k by code · 2 + 1, in the upper of six bits
    __m512i marked[2][4];      // low and high bytes of k by code · 2 + 1, in the upper of eight bits; up to 7 planes
    __m512i whole[2][4];       // low and high bytes of k by code; 8 planes

    void prepare(const float* table) {
        if (!known.empty() && std::memcmp(known.data(), table, 9 * 256 * sizeof(float)) == 0) return;
        known.assign(table, table + 9 * 256);
        on_bytes = true;
        uint8_t bytes[64] = {}, low[256] = {}, high[256] = {}, low8[256], high8[256];
        for (Grid& grid : grids) grid.step[0] = grid.lowest[0] = 0;
        for (int planes = 1; planes <= 8; ++planes) {
            const float* levels = table + 256 * planes;
            const int count = 1 << planes;
            const float lowest = *std::min_element(levels, levels + count);
            const float range = *std::max_element(levels, levels + count) - lowest;
            for (Grid& grid : grids) grid.lowest[planes] = lowest;
            const float fine = grids[1].step[planes] = range / 65535;
            for (int code = 0; code < count; ++code) {
                const int k = fine > 0 ? int((levels[code] - lowest) / fine + 0.5f) : 0;
                const int marked_at = (2 * code + 1) << (8 - planes) >> 1;
                (planes < 8 ? low[marked_at] : low8[code]) = uint8_t(k);
                (planes < 8 ? high[marked_at] : high8[code]) = uint8_t(k >> 8);
            }
            if (planes > BYTE_PLANES) continue;
            // Evenly spaced levels are on a grid of fewer steps.
            const int even = 255 / (count - 1) * (count - 1);
            on_bytes &= put_bytes(levels, planes, range / 255, bytes) || put_bytes(levels, planes, range / even, bytes);
        }
        byte = _mm512_loadu_si512(bytes);
        for (int i = 0; i < 4; ++i) {
            marked[0][i] = _mm512_loadu_si512(low + 64 * i), marked[1][i] = _mm512_loadu_si512(high + 64 * i);
            whole[0][i] = _mm512_loadu_si512(low8 + 64 * i), whole[1][i] = _mm512_loadu_si512(high8 + 64 * i);
        }
    }

  private:
    // Whether the levels are on a grid of that step; if so, sets their bytes.
    bool put_bytes(const float* levels, int planes, float step, uint8_t* bytes) {
        Grid& grid = grids[0];
        grid.step[planes] = step;
        for (int code = 0; code < 1 << planes; ++code) {
            const float place = step > 0 ? (levels[code] - grid.lowest[planes]) / step : 0;
            const int k = int(place + 0.5f);
            if (std::abs(place - float(k)) > 1e-3f) return false;
            bytes[(2 * code + 1) << (BYTE_PLANES - planes)] = uint8_t(k);
        }
        return true;
    }
};

inline __m512i look_up_256(const __m512i* table, __m512i index) {
    const __m512i below = _mm512_permutex2var_epi8(table[0], index, table[1]),
                  above = _mm512_permutex2var_epi8(table[2], index, table[3]);
    return _mm512_mask_mov_epi8(below, _mm512_movepi8_mask(index), above);
}

// Reads rows of one width.
struct RowReader {
    struct Slice {
        __m512i marker;          // the marker bits
        __m512i places[SLICES];  // of 64 bytes of a row: which of them goes to each byte of the slice
        __mmask64 taken[SLICES];
        __mmask64 whole;  // dims of 8 planes, where k has two bytes
        int8_t planes[SLICE / 8];
    };
    Slice slices[SLICES];
    __mmask64 readable[SLICES];  // of 64 bytes of a row: those that it has
    int bytes, count, parts;     // of a row; slices; 64-byte parts of a row
    int k_bytes;

    void prepare(const Layout& layout, int index, const Levels& levels) {
        const uint8_t* held = layout.planes[index];
        bytes = layout.row_bytes(index), count = (8 * layout.octets + SLICE - 1) / SLICE, parts = (bytes + 63) / 64;
        k_bytes = levels.on_bytes && *std::max_element(held, held + layout.octets) <= BYTE_PLANES ? 1 : 2;
        for (int p = 0; p < parts; ++p) readable[p] = ~uint64_t(0) >> (64 - std::min(64, bytes - 64 * p));
        const int first = k_bytes == 1 ? 7 - BYTE_PLANES : 0;  // a code's bits are the last six, or all
        for (int s = 0; s < count; ++s) {
            Slice& slice = slices[s];
            alignas(64) uint8_t marker[64] = {}, places[SLICES][64] = {};
            std::fill(slice.taken, slice.taken + SLICES, 0);
            slice.whole = 0;
            for (int i = 0; i < SLICE / 8; ++i) {
                const int o = s * SLICE / 8 + i, planes = o < layout.octets ? held[o] : 0;
                slice.planes[i] = int8_t(planes);
                for (int p = 0; p < planes; ++p) {
                    const int u = layout.place[8 * o + p], at = 8 * i + first + p;
                    places[u / 64][at] = uint8_t(u % 64);
                    slice.taken[u / 64] |= __mmask64(1) << at;
                }
                if (planes < 8)
                    marker[8 * i + first + planes] = 255;
                else
                    slice.whole |= __mmask64(255) << (8 * i);
            }
            slice.marker = _mm512_load_si512(marker);
            for (int p = 0; p < SLICES; ++p) slice.places[p] = _mm512_load_si512(places[p]);
        }
    }

    // Calls visit(i, which byte of k, that byte of 64 dims), low bytes first, for ROWS rows of a slice. If there are
    // only n, the last one is repeated.
    template <int K, int ROWS, typename Visit>
    inline void read(const Levels& levels, int s, const uint8_t* rows, int n, Visit visit) const {
        if (parts == 1)
            read_parts<K, ROWS, 1>(levels, s, rows, n, visit);
        else
            read_parts<K, ROWS, SLICES>(levels, s, rows, n, visit);
    }

  private:
    template <int K, int ROWS, int PARTS, typename Visit>
    inline void read_parts(const Levels& levels, int s, const uint8_t* row, int n, Visit visit) const {
        // Bit 7 - b of a dim's byte comes from the octet's byte b.
        const __m512i each_dim = _mm512_set1_epi64(int64_t(0x8040201008040201));
        const Slice& slice = slices[s];
        const __m512i marker = slice.marker, places = slice.places[0], table = levels.byte;
        const __mmask64 taken = slice.taken[0], valid = readable[0], whole = slice.whole;
        const int step = bytes;
        const auto codes_of = [&](const uint8_t* from) {
            __m512i units = _mm512_mask_permutexvar_epi8(marker, taken, places, _mm512_maskz_loadu_epi8(valid, from));
            if constexpr (PARTS > 1)
                for (int p = 1; p < parts; ++p)
                    units = _mm512_mask_permutexvar_epi8(units, slice.taken[p], slice.places[p],
                                                         _mm512_maskz_loadu_epi8(readable[p], from + 64 * p));
            _mm_prefetch(reinterpret_cast<const char*>(from + AHEAD), _MM_HINT_T0);
            return _mm512_gf2p8affine_epi64_epi8(each_dim, units, 0);
        };
        if constexpr (K == 1) {
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i, row += i < n ? step : 0)
                visit(i, 0, _mm512_permutexvar_epi8(codes_of(row), table));
        } else {  // few rows are this wide, so code size matters more
#pragma GCC unroll 1
            for (int i = 0; i < ROWS; ++i, row += i < n ? step : 0) {
                const __m512i codes = codes_of(row);
                for (int k = 0; k < 2; ++k) {
                    __m512i found = look_up_256(levels.marked[k], codes);
                    if (whole) found = _mm512_mask_mov_epi8(found, whole, look_up_256(levels.whole[k], codes));
                    visit(i, k, found);
                }
            }
        }
    }
};

}  // namespace
QAQ_END_TARGET
