// What is known of packed rows before any is read (qaq_core/quantization/bit_planes.py).
#pragma once

#include <algorithm>
#include <cstdint>

#include "target.h"
#include "widths.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int TILE = 64;  // rows taken from a pool together

// Which units hold the planes of each octet, of one side.
struct Layout {
    int octets, split;
    const float* levels;     // [9][256], of b bits at 256·b
    uint8_t place[MAX_DIM];  // [octets][8], the unit that holds a plane
    uint8_t planes[HALF][MAX_DIM / 8];  // of each octet in rows of a width

    Layout(const uint8_t* order, int dim, int first, const float* tables) : octets(dim / 8), split(first), levels(tables) {
        uint8_t held[MAX_DIM / 8] = {};
        for (int index = 0, u = 0; index < HALF; ++index) {
            for (; u < row_bytes(index); ++u) place[8 * order[u] + held[order[u]]++] = uint8_t(u);
            std::copy(held, held + octets, planes[index]);
        }
    }
    int row_bytes(int index) const { return HALF_BITS[index] * octets / 2; }
};

struct Tile {  // n <= TILE rows of one width
    const uint8_t* rows;
    int index, n;
    bool last;            // whether bytes beyond the last row are not to be read
    const float* scales;  // [2][TILE], of the octets before the split and of the others
};

}  // namespace
QAQ_END_TARGET
