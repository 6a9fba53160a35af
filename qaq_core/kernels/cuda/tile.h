// A tile: up to 32 rows of one width, of which byte (unit u, row t) is at u·m + t of m rows, a multiple of 4.
#pragma once
#include "levels.h"
#include "order.h"

template <int DIM, int SIDE>
struct Tile {
    static constexpr int OCTETS = DIM / 8;
    int width, m, begin;  // rows, and where they begin in the order
    const uint8_t* base;

    template <class Order>
    QAQ_INLINE Tile(const Order& order, const unsigned long long* runs, int index) {
        const auto& side = order.side[SIDE];
        const uint32_t tile = side.tiles[index];
        const int row = tile & 0xffff;
        width = tile >> 16;
        m = min(32, (side.count[width] - row + 3) & ~3);
        begin = side.begin[width] + row;
        base = reinterpret_cast<const uint8_t*>(runs[16 * SIDE + width]) +
               static_cast<long long>(row) * row_bytes<DIM>(width);
    }
    // Of the octets that a warp decodes in its step i.
    QAQ_INLINE int deepest(const Layout& layout, int i) const {
        return read<uint8_t>(layout.deepest + (SIDE * WIDTHS + width) * (OCTETS / 4) + i);
    }
    QAQ_INLINE int octet(int o) const { return (SIDE * WIDTHS + width) * OCTETS + o; }
};
