// The layout of packed rows (qaq_core/quantization/bit_planes.py).
#pragma once

#include <algorithm>
#include <cstdint>

#include "target.h"
#include "widths.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int TILE = 64;  // rows that are processed together

// Which units hold the planes of each octet, on one side.
struct Layout {
    int octets, split;                  // split: octets of the first scale
    const float* levels;                // [9][256], of b bits at 256·b
    uint8_t place[MAX_DIM];             // [octets][8], the unit that holds a plane
    uint8_t planes[HALF][MAX_DIM / 8];  // by width and octet

    Layout(const uint8_t* order, int dim, int first, const float* tables)
        : octets(dim / 8), split(first), levels(tables) {
        uint8_t count[MAX_DIM / 8] = {};
        for (int index = 0, u = 0; index < HALF; ++index) {
            for (; u < row_bytes(index); ++u) place[8 * order[u] + count[order[u]]++] = uint8_t(u);
            std::copy(count, count + octets, planes[index]);
        }
    }
    int row_bytes(int index) const { return HALF_BITS[index] * octets / 2; }
};

// Up to TILE rows of one width.
struct Tile {
    const uint8_t* rows;
    int index, n;
    bool last;            // bytes beyond the last row must not be read
    const float* scales;  // [2][TILE], of the octets before the split, of the others
};

}  // namespace
QAQ_END_TARGET
