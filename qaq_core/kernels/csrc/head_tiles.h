// The packed rows of a KV head, a tile of one width at a time, without AVX-512.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "head.h"
#include "key_mean.h"
#include "layout.h"
#include "packed_rows.h"
#include "quads.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

// Scratch memory of one thread, kept from call to call.
struct Scratch {
    std::vector<float> scores, by_row, coefficients, residual, packed, shares;
    std::vector<int32_t> positions;
    KeyMeanScores means;
    RowScratch rows;
};

// A KV head with its scratch memory, and the loop over its packed rows.
struct HeadTiles : HeadOfLayer {
    Scratch& scratch;
    int padded, quads;  // positions with a score, used or not; quads of query heads

    // The scores, later weights, of a quad of query heads: [padded][QUAD].
    float* scores(int quad) const { return scratch.scores.data() + int64_t(quad) * padded * QUAD; }
    float* packed_scores(int quad, int begin) const { return scores(quad) + int64_t(layer.sinks + begin) * QUAD; }
    float* by_row() const { return scratch.by_row.data(); }  // scores or weights of a tile, [4 * quads][TILE]

    // Lists the positions of the n tags whose nibble is `index` in scratch.positions and returns their number. Fills up
    // to a multiple of eight with `nowhere`, the position of no token.
    int find(const uint8_t* tags, int n, int shift, int index, int nowhere) const {
        int32_t* out = scratch.positions.data();
        int found = 0, t = 0;
#ifdef QAQ_AVX2
        const __m256i want = _mm256_set1_epi8(char(index << shift)), nibble = _mm256_set1_epi8(char(15 << shift));
        for (; t + 32 <= n; t += 32) {
            const __m256i tag = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tags + t));
            uint32_t here = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(tag, nibble), want));
            for (int i = 0; i < 32; i += 8, here >>= 8) {
                const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(set_bits.of[here & 255]));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + found),
                                    _mm256_add_epi32(_mm256_cvtepu8_epi32(places), _mm256_set1_epi32(t + i)));
                found += __builtin_popcount(here & 255);
            }
        }
#endif
        for (; t < n; ++t)
            if ((tags[t] >> shift & 15) == index) out[found++] = t;
        std::fill(out + found, out + (found + 7) / 8 * 8, nowhere);
        return found;
    }

    // scales[part * TILE + i]: of the octets before the split (part 0) and of the others, of token t + positions[i].
    // Fills up to a multiple of 32 with zeros.
    void look_up_scales(const QaqSide& side, int64_t t, const int32_t* positions, int n, float* scales) const {
        const int64_t begin = head * side.affine_head_stride + t;
        const auto look_up = [&](auto scale_of) {
            int i = 0;
            for (; i + 8 <= n; i += 8)
                to_parts([&](int k) { return scale_of(begin + positions[i + k]); }, side.parts - 1, scales + i);
            if (i < n)
                to_parts([&](int k) { return scale_of(begin + positions[std::min(i + k, n - 1)]); }, side.parts - 1,
                         scales + i);
        };
        if (side.meta && side.parts == 2) {
            look_up([&](int64_t at) { return side.scales + side.meta[at] * 2; });
        } else if (side.meta) {
            look_up([&](int64_t at) { return side.scales + side.meta[at] * side.parts; });
        } else {
            look_up([&](int64_t at) { return side.scale + at * side.parts; });
        }
        for (int i = (n + 7) / 8 * 8; i % 32; i += 8) store(scales + i, f8{}), store(scales + TILE + i, f8{});
    }

    // Calls visit(tile, positions) for a block's packed keys (shift 0) or values (shift 4), TILE rows at a time.
    template <typename Visit>
    void each_packed_tile(int shift, const Layout& layout, int block, Visit visit) const {
        const QaqSide& side = shift ? layer.value : layer.key;
        const int begin = block * layer.block_tokens, n = std::min(layer.block_tokens, layer.packed - begin);
        const uint8_t* tags = layer.tags + head * layer.tags_head_stride + begin;
        const int nowhere = padded - 1 - layer.sinks - begin;
        float scales[2 * TILE];
        for (int index = 1; index < QAQ_WIDTHS; ++index) {
            if (!side.rows[block].base[index]) continue;
            const int found = find(tags, n, shift, index, nowhere), bytes = layout.row_bytes(index);
            const int64_t before = side.rows[block].first[head * QAQ_WIDTHS + index];
            const uint8_t* rows = side.rows[block].base[index] + before * bytes;
            for (int i = 0; i < found; i += TILE) {
                const int some = std::min(TILE, found - i);
                const int32_t* positions = scratch.positions.data() + i;
                look_up_scales(side, begin, positions, some, scales);
                const bool last = int64_t(found - i - some) * bytes < OVERREAD;
                visit(Tile{rows + int64_t(i) * bytes, index, some, last, scales}, positions);
            }
        }
    }
};

}  // namespace
QAQ_END_TARGET
