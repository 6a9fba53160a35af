// Packed rows unpacked to floats, with any instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "float_rows.h"
#include "layout.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

// of[b]: the bits of b, one a byte.
struct Spread {
    uint64_t of[256];
    constexpr Spread() : of() {
        for (int b = 0; b < 256; ++b)
            for (int j = 0; j < 8; ++j) of[b] |= uint64_t(b >> j & 1) << (8 * j);
    }
};
constexpr Spread spread;

void unpack(const Tile& tile, const Layout& layout, float* out) {
    if (tile.index == HALF) return unpack_halves(tile, layout, out);
    const int size = layout.row_bytes(tile.index);
    for (int o = 0; o < layout.octets; ++o) {
        const int held = layout.planes[tile.index][o];
        const float *table = layout.levels + 256 * held, *scales = tile.scales + (o < layout.split ? 0 : TILE);
        for (int i = 0; i < tile.n; ++i) {
            const uint8_t* row = tile.rows + int64_t(i) * size;
            float* to = out + (int64_t(i) * layout.octets + o) * 8;
            uint64_t codes = 0;
            for (int p = 0; p < held; ++p) codes |= spread.of[row[layout.place[8 * o + p]]] << (held - 1 - p);
            for (int j = 0; j < 8; ++j) to[j] = held ? scales[i] * table[codes >> (8 * j) & 255] : 0.0f;
        }
    }
}

// Scratch memory of one thread.
struct RowScratch {
    std::vector<float> floats;  // [TILE][dim], an unpacked tile

    void prepare_keys(const float*, const float*, int64_t, int, int) {}
    void prepare_values(const float*) {}
};

}  // namespace
QAQ_END_TARGET
