// Rows of codes with AVX2: products of 16-bit levels with 16-bit queries or weights, summed in 32 bits.
#pragma once
#define QAQ_AVX2

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "code_levels_avx2.h"
#include "code_tiles_avx2.h"
#include "float_rows.h"
#include "layout.h"
#include "query_codes_avx2.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

inline __m256i pair_of(const int16_t* two) {
    int32_t pair;
    std::memcpy(&pair, two, 4);
    return _mm256_set1_epi32(pair);
}

// sums[h * TILE + i]: scores of 32 rows for H heads from g on. pairs: [octets with planes][4][4], from unpack_pairs.
template <int H>
QAQ_NOINLINE void score_pairs(const uint8_t* planes, const Layout& layout, const __m256i* pairs,
                              const QueryCodes& queries, int g, const float* scales, float* sums) {
    f8 parts[2][H][4];
    for (auto& part : parts)
        for (auto& of_head : part)
            for (f8& sum : of_head) sum = f8{};
    for (int begin = 0, end; begin < layout.octets; begin = end) {
        end = std::min((begin / CHUNK + 1) * CHUNK, begin < layout.split ? layout.split : layout.octets);
        __m256i held[H][4];
        for (int h = 0; h < H; ++h)
            for (int v = 0; v < 4; ++v) held[h][v] = _mm256_setzero_si256();
        for (int o = begin; o < end; ++o) {
            if (!planes[o]) continue;
            const int16_t* query = queries.octet(planes[o], g, o);
#pragma GCC unroll 1
            for (int i = 0; i < 4; ++i, pairs += 4) {
                __m256i both[H];
                for (int h = 0; h < H; ++h) both[h] = pair_of(query + h * queries.dim + 2 * i);
                for (int v = 0; v < 4; ++v) {
                    const __m256i x = _mm256_load_si256(pairs + v);
                    for (int h = 0; h < H; ++h)
                        held[h][v] = _mm256_add_epi32(held[h][v], _mm256_madd_epi16(x, both[h]));
                }
            }
        }
        f8(*part)[4] = parts[begin >= layout.split];
        for (int h = 0; h < H; ++h)
            for (int v = 0; v < 4; ++v) part[h][v] += (f8)_mm256_cvtepi32_ps(held[h][v]);
    }
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < 4; ++v)
            store(sums + h * TILE + 8 * v, queries.units[g + h] * (load(scales + 8 * v) * parts[0][h][v] +
                                                                   load(scales + TILE + 8 * v) * parts[1][h][v]));
}

// Scratch memory of one thread.
struct RowScratch {
    std::vector<float> floats;                          // [TILE][dim], an unpacked tile
    alignas(32) uint8_t padded[(MAX_DIM + 16) * TILE];  // a tile at the end of its memory
    __m256i units[MAX_DIM + 16];                        // half a tile, transposed
    __m256i levels[MAX_DIM * TILE / 16];
    LevelTables tables;
    QueryCodes queries;

    void prepare_keys(const float* table, const float* asked, int64_t step, int heads, int dim) {
        tables.prepare(table, KEY_LEVELS);
        queries.quantize(asked, step, heads, dim, tables.unit);
    }
    void prepare_values(const float* table) { tables.prepare(table, VALUE_LEVELS); }
};

// The tile's rows, where 15 more bytes can be read.
inline const uint8_t* readable(const Tile& tile, int size, RowScratch& scratch) {
    if (!tile.last) return tile.rows;
    std::memcpy(scratch.padded, tile.rows, int64_t(tile.n) * size);
    return scratch.padded;
}

// Unpacks the tile's octets that have planes to scratch.levels: `step` vectors for one or two slots, of which `each`
// are for 32 rows.
template <int ROW(int)>
void read_levels(const Layout& layout, const Tile& tile, Unpack* const* octet, int each, int step,
                 RowScratch& scratch) {
    const int size = layout.row_bytes(tile.index);
    const uint8_t *planes = layout.planes[tile.index], *rows = readable(tile, size, scratch);
    for (int first = 0; first < tile.n; first += 32) {
        transpose<ROW>(rows + int64_t(first) * size, size, scratch.units);
        __m256i* to = scratch.levels + first / 32 * each;
        for (int o = 0; o < layout.octets; ++o) {
            if (!planes[o]) continue;
            octet[planes[o]](scratch.units, layout.place + 8 * o, scratch.tables, to, step);
            to += ROW == row_of_pairs ? 4 * step : 8 * step;
        }
    }
}

void score_codes(const Layout& layout, const Tile& tile, float* sums, RowScratch& scratch) {
    const uint8_t* planes = layout.planes[tile.index];
    const int heads = scratch.queries.heads, held = layout.octets - int(std::count(planes, planes + layout.octets, 0));
    read_levels<row_of_pairs>(layout, tile, PAIRS, 16 * held, 4, scratch);
    for (int first = 0; first < tile.n; first += 32)
        for (int g = 0; g < heads; g += 2)
            (heads - g > 1 ? score_pairs<2> : score_pairs<1>)(planes, layout, scratch.levels + first / 32 * 16 * held,
                                                              scratch.queries, g, tile.scales + first,
                                                              sums + g * TILE + first);
}

// The weights of 16·V rows, none below 0, times their scales, as integers. Returns the weight of integer 1.
template <int V>
QAQ_NOINLINE float quantize_weights(const float* weights, const float* scales, __m256i* out) {
    f8 wide[2 * V], most = {}, sum = {};
    for (int i = 0; i < 2 * V; ++i) {
        wide[i] = load(weights + 8 * i) * load(scales + 8 * i);
        most = (f8)_mm256_max_ps((__m256)most, (__m256)wide[i]), sum += wide[i];
    }
    float unit = std::max(total(sum) * (VALUE_LEVELS / SUM_MOST), std::numeric_limits<float>::min());
    for (int i = 0; i < 8; ++i) unit = std::max(unit, most[i] / MOST);
    const f8 share = splat(1.0f / unit);
    for (int i = 0; i < V; ++i)
        out[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32((__m256)(wide[2 * i] * share)),
                                                             _mm256_cvtps_epi32((__m256)(wide[2 * i + 1] * share))),
                                          0xd8);
    return unit;
}

// The sums of eight vectors' elements.
inline __m256i totals(const __m256i* v) {
    __m256i pairs[4], quads[2];
    for (int i = 0; i < 4; ++i)  // vectors 2i and 2i+1, alternating
        pairs[i] = _mm256_hadd_epi32(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; ++i) quads[i] = _mm256_hadd_epi32(pairs[2 * i], pairs[2 * i + 1]);
    return _mm256_add_epi32(_mm256_permute2x128_si256(quads[0], quads[1], 0x20),
                            _mm256_permute2x128_si256(quads[0], quads[1], 0x31));
}

// Adds the weighted rows to out. levels: [octets with planes][8][V], from unpack_slots.
template <int V>
QAQ_NOINLINE void weigh_slots(const uint8_t* planes, const Layout& layout, const __m256i* levels, float level_unit,
                              const float* weights, const float* scales, float* out) {
    for (int part = 0; part < 2; ++part, scales += TILE) {
        __m256i weight[V];
        const f8 unit = splat(quantize_weights<V>(weights, scales, weight) * level_unit);
        for (int o = part ? layout.split : 0; o < (part ? layout.octets : layout.split); ++o) {
            if (!planes[o]) continue;
            __m256i sums[8];
            for (int slot = 0; slot < 8; ++slot, levels += V) {
                sums[slot] = _mm256_madd_epi16(levels[0], weight[0]);
                for (int v = 1; v < V; ++v)
                    sums[slot] = _mm256_add_epi32(sums[slot], _mm256_madd_epi16(levels[v], weight[v]));
            }
            const __m256i sorted = _mm256_permutevar8x32_epi32(totals(sums), order_of(field_bits(planes[o])));
            store(out + 8 * o, load(out + 8 * o) + unit * (f8)_mm256_cvtepi32_ps(sorted));
        }
    }
}

void weigh_codes(const Layout& layout, const Tile& tile, int heads, const float* weights, float* out, int64_t step,
                 RowScratch& scratch) {
    const uint8_t* planes = layout.planes[tile.index];
    const bool whole = tile.n > 32;
    read_levels<row_of_slots>(layout, tile, SLOTS, 2, whole ? 4 : 2, scratch);
    for (int g = 0; g < heads; ++g)
        (whole ? weigh_slots<4> : weigh_slots<2>)(planes, layout, scratch.levels, scratch.tables.unit,
                                                  weights + g * TILE, tile.scales, out + g * step);
}

inline void unpack(const Tile& tile, const Layout& layout, float* out) { unpack_halves(tile, layout, out); }

}  // namespace
QAQ_END_TARGET
