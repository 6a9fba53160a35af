// The rows of a pool are put in order again: written to their new places from where they were, with the bytes that they
// lack, or without those that they lose. Tags before and after are the only index.
//
// A block of threads has one block of tokens of a layer and head; a warp writes a tile, of which a lane has a row.
#pragma once
#include "structures.h"

struct WeaveArgs {
    const uint8_t* before;         // tags [runs, before_tokens]; a run is a layer and head
    const uint8_t* after;          // [runs, after_tokens]
    const uint8_t* origin;         // tiles
    const long long* from_places;  // [runs, before_blocks, 16] where the rows of a width begin
    uint8_t* to;
    const long long* to_places;  // [runs, after_blocks, 16]
    const uint8_t* keep;       // [runs, after_tokens] width up to which the old row is kept; ALL_KEPT, or null for all
    const long long* offsets;  // [runs, after_tokens] where the bytes of a row that keeps less begin in `planes`
    const uint8_t* planes;
    long long before_stride, after_stride;                                            // from run to run
    int before_tokens, after_tokens, before_blocks, after_blocks, side, unit, tiled;  // unit: bytes of half a bit
};

constexpr int ALL_KEPT = 255;

// Bytes of half bits of a width, by its index into WIDTHS.
QAQ_INLINE int half_bits(int width) { return width == HALF_WIDTH ? 32 : width <= 8 ? width : 2 * width - 8; }

// The bytes of a row: the first one, and how far it is from one to the next.
struct Strided {
    long long at;
    int step;
};
QAQ_INLINE Strided row_at(long long begin, int width, int row, int count, int unit, int tiled) {
    const int bytes = half_bits(width) * unit;
    if (!tiled || width == HALF_WIDTH) return {begin + static_cast<long long>(row) * bytes, 1};
    const int tile = row & ~31, held = min(32, (count - tile + 3) & ~3);
    return {begin + static_cast<long long>(tile) * bytes + row - tile, held};
}

template <int BLOCK>
struct Weave {
    static constexpr int THREADS = 128;
    uint16_t rank[BLOCK], place[BLOCK];  // of a token's old row; the tokens in the order of their new widths
    uint8_t width[BLOCK];                // of the old row
    int held[16], count[16], begin[16];

    QAQ_INLINE void run(const WeaveArgs& args) {
        const int tid = thread_index(), lane = tid & 31, warp = tid / 32, first = int(blockIdx.x) * BLOCK;
        const long long run = blockIdx.y;
        const int old_tokens = max(0, min(BLOCK, args.before_tokens - first));
        const int tokens = min(BLOCK, args.after_tokens - first);
        const uint8_t* before = args.before + run * args.before_stride + first;
        const uint8_t* after = args.after + run * args.after_stride + first;
        if (tid < 16) held[tid] = count[tid] = 0;
        __syncthreads();
        if (warp == 0) {
            ranks(before, args.side, old_tokens, held, [&](int t, int w, int r) {
                rank[t] = static_cast<uint16_t>(r);
                width[t] = static_cast<uint8_t>(w);
            });
        } else if (warp == 1) {
            ranks(after, args.side, tokens, count, [](int, int, int) {});
        }
        __syncthreads();
        if (tid == 0) {
            int sum = 0;
            for (int w = 0; w < 16; w++) {
                begin[w] = sum;
                sum += count[w];
                count[w] = 0;
            }
        }
        __syncthreads();
        if (warp == 0)
            ranks(after, args.side, tokens, count,
                  [&](int t, int w, int r) { place[begin[w] + r] = static_cast<uint16_t>(t); });
        __syncthreads();
        int turn = 0;
        for (int w = 1; w < WIDTHS; w++)
            for (int row = 0; row < count[w]; row += 32)
                if (turn++ % (THREADS / 32) == warp && row + lane < count[w])
                    write(args, run, first, w, row + lane, old_tokens);
    }

  private:
    // A warp tells `each` a token's width and its rank among the tokens of that width, and counts them.
    template <class Each>
    QAQ_INLINE void ranks(const uint8_t* tags, int side, int tokens, int* counts, Each each) {
        const int lane = lane_index();
        const uint32_t before = (1u << lane) - 1;
        for (int i = 0; i < tokens; i += 32) {
            const int t = i + lane;
            const uint32_t w = t < tokens ? read<uint8_t>(tags + t) >> (4 * side) & 15 : 15;
            const uint32_t same = alike(w);
            const int r = counts[w] + __popc(same & before);
            __syncwarp();
            if (!(same & before)) counts[w] += __popc(same);
            __syncwarp();
            if (t < tokens) each(t, static_cast<int>(w), r);
        }
    }
    QAQ_INLINE void write(const WeaveArgs& args, long long run, int first, int w, int row, int old_tokens) const {
        const int t = place[begin[w] + row], bytes = half_bits(w) * args.unit;
        const long long* places = args.to_places + (run * args.after_blocks + blockIdx.x) * 16;
        const Strided to = row_at(places[w], w, row, count[w], args.unit, args.tiled);
        const long long at = run * args.after_tokens + first + t;
        int kept = args.keep ? args.keep[at] : ALL_KEPT;
        kept = kept == ALL_KEPT ? bytes : kept * args.unit;
        if (t < old_tokens && kept) {
            const int old = width[t];
            const Strided from = row_at(args.from_places[(run * args.before_blocks + blockIdx.x) * 16 + old], old,
                                        rank[t], held[old], args.unit, 1);
            for (int u = 0; u < kept; u++)
                args.to[to.at + static_cast<long long>(u) * to.step] =
                    read<uint8_t>(args.origin + from.at + static_cast<long long>(u) * from.step);
        }
        for (int u = kept; u < bytes; u++)
            args.to[to.at + static_cast<long long>(u) * to.step] =
                read<uint8_t>(args.planes + args.offsets[at] + u - kept);
    }
};
