// A block's tokens in the order of their widths: a counting sort in shared memory.
#pragma once
#include "structures.h"

template <int BLOCK, int WARPS>
struct Order {
    static constexpr int FILLED = BLOCK + 3 * WIDTHS + 2;  // runs begin at multiples of 4
    static constexpr int EACH = BLOCK / WARPS / 32;
    static constexpr int NOWHERE = (FILLED + 7) & ~7;  // eight rows of NOBODY
    static constexpr uint16_t NOBODY = BLOCK;

    struct Side {
        alignas(16) uint16_t place[NOWHERE + 8];  // of a run's row: the token, NOBODY where a run is filled up
        uint8_t meta[NOWHERE + 8];
        uint32_t tiles[BLOCK / 32 + WIDTHS];  // width << 16 | first row
        int begin[16], count[16], number;
    } side[SIDES];
    int ahead[WARPS][SIDES * 16];  // rows of a width in a warp's part; later those of the warps before it

    // Args: tokens: how many the block has, from `first` on.
    QAQ_INLINE void sort(const Sequence& one, int head, int first, int tokens) {
        const int tid = thread_index(), lane = lane_index(), warp = tid / 32;
        for (int s = 0; s < SIDES; s++)
            for (int i = tid; i < (NOWHERE + 8) / 8; i += 32 * WARPS) {
                constexpr uint32_t two = NOBODY * 0x10001u;
                reinterpret_cast<uint4*>(side[s].place)[i] = make_uint4(two, two, two, two);
                reinterpret_cast<uint2*>(side[s].meta)[i] = uint2{0, 0};
            }
        for (int i = lane; i < SIDES * 16; i += 32) ahead[warp][i] = 0;
        __syncthreads();
        const uint8_t* tags = one.tags + head * one.tag_stride + first;
        const uint32_t before = (1u << lane) - 1;
        uint32_t tag[EACH], rank[EACH];  // ranks of a key and of a value within the warp's part, 16 bits each
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int t = (warp * EACH + i) * 32 + lane;
            tag[i] = t < tokens ? read<uint8_t>(tags + t) : 0xff;
            rank[i] = 0;
#pragma unroll
            for (int s = 0; s < SIDES; s++) {
                const uint32_t width = tag[i] >> (4 * s) & 15, same = alike(width);
                int* count = &ahead[warp][16 * s + width];
                rank[i] |= static_cast<uint32_t>(*count + __popc(same & before)) << (16 * s);
                __syncwarp();
                if (!(same & before)) *count += __popc(same);
                __syncwarp();
            }
        }
        __syncthreads();
        if (warp == 0) count_runs(lane);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int t = (warp * EACH + i) * 32 + lane;
            if (t < tokens) {
#pragma unroll
                for (int s = 0; s < SIDES; s++) {
                    const uint32_t width = tag[i] >> (4 * s) & 15;
                    const int at = ahead[warp][16 * s + width] + (rank[i] >> (16 * s) & 0xffff);
                    side[s].place[at] = static_cast<uint16_t>(t);
                    side[s].meta[at] = read<uint8_t>(one.meta[s] + head * one.meta_stride[s] + first + t);
                }
            }
        }
    }

  private:
    // Where runs begin, and their tiles; lane 16·side + width.
    QAQ_INLINE void count_runs(int lane) {
        const int width = lane & 15;
        int count = 0;
        for (int w = 0; w < WARPS; w++) {
            const int mine = ahead[w][lane];
            ahead[w][lane] = count;
            count += mine;
        }
        if (width >= WIDTHS) count = 0;
        const int filled = (count + 3) & ~3, tiled = width && width < HALF_WIDTH ? (count + 31) / 32 : 0;
        int begin = filled, tile = tiled;
        for (int step = 1; step < 16; step *= 2) {
            const int more = from_below(begin, step), more_tiles = from_below(tile, step);
            if (width >= step) begin += more, tile += more_tiles;
        }
        Side& mine = side[lane / 16];
        mine.begin[width] = begin -= filled;
        mine.count[width] = count;
        if (width == 15) mine.number = tile;
        for (int w = 0; w < WARPS; w++) ahead[w][lane] += begin;
        for (int i = 0; i < tiled; i++) mine.tiles[tile - tiled + i] = width << 16 | 32 * i;
    }
};

// Four bytes, or four numbers of two bytes, of shared memory.
struct Four {
    int x[4];
};
QAQ_INLINE Four four_places(const uint16_t* at) {
    const uint2 both = *reinterpret_cast<const uint2*>(at);
    return {{int(both.x & 0xffff), int(both.x >> 16), int(both.y & 0xffff), int(both.y >> 16)}};
}
QAQ_INLINE Four four_bytes(const uint8_t* at) {
    const uint32_t all = *reinterpret_cast<const uint32_t*>(at);
    return {{int(all & 255), int(all >> 8 & 255), int(all >> 16 & 255), int(all >> 24)}};
}
