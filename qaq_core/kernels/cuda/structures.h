// What kernels are given. Python has the same structures (structures.py), field by field.
#pragma once
#include "machine.h"

constexpr int WIDTHS = 14, HALF_WIDTH = 13, SIDES = 2;
constexpr int QUAD = 4;         // query heads that a block of threads takes
constexpr int NEAR = 64;        // positions of the table of near angles
constexpr int POOLS = 2;        // of a table of levels, 16 bytes each
constexpr int MOST_PICKED = 5;  // planes whose levels are picked from registers; those of more are read from memory
constexpr int DEEPER = 6;       // stands for more

// The rotation of one side of one layer of a sequence, see `Rotation` of qaq_core; without vectors there is none.
struct Turn {
    const int8_t* vectors;  // [heads, dim * (dim + 1) / 2 - 1]
    const float* factors;   // [heads, dim - 1], 2 / |vector|²
    const float* before;    // [heads, dim / 8]
    const float* after;
};

// The packed tokens of one layer of one sequence, and where exact ones are: written when rows are packed or moved.
struct Sequence {
    const uint8_t* tags;             // [heads, tokens]
    const uint8_t* meta[SIDES];      // [heads, tokens]
    const unsigned long long* runs;  // [heads, blocks, 2, 16] where the rows of a width begin
    void* exact[SIDES];              // [heads, places, dim]
    const float* key_mean;           // [heads, dim], or null
    const float* value_mean;
    Turn turns[SIDES];
    long long tag_stride, meta_stride[SIDES], exact_stride[SIDES];  // from head to head, in elements
    int tokens, blocks, start, unused;  // packed tokens, their blocks, position of the first
};

// A sequence in a decode step: what differs from step to step, and is the same in all layers.
struct Step {
    const Sequence* layers;
    void* originals;   // [layers, 2, heads, dim] of the new token, in the type that it comes in, or null
    float* scores;     // [heads * group, length], or null where nobody wants a statistic
    float* statistic;  // [layers, heads, length]
    float* log_sums;   // [layers, heads * group], or null
    int sinks, exact_tokens, ring, ring_first;  // the i-th recent one is at sinks + (ring_first + i) % ring
    int new_place;                              // where the new token goes among the exact ones, or -1
    int reduction;                              // 1 the maximum, 2 the mean square
};

// What layers, sequences and heads share: tables of a codec, and a layer's matrices.
struct Layout {
    const uint8_t* units;    // [2, 14, octets, 8] place of a plane in a row of a width; of one not held, any
    const uint8_t* planes;   // [2, 14, octets]
    const uint8_t* deepest;  // [2, 14, octets / 4] planes of the deepest of four octets, at most DEEPER
    const uint4* pools;      // [2, 14, octets, POOLS] bytes of levels, low ones of eight, high ones of eight
    const uint16_t* levels;  // [9, 256] halves
    const float2* scales;    // [256] of a meta byte: of the first quarter of the octets, of the rest
    const float* angles;     // [positions, dim] cosines and sines, or null where keys are not centered
    const uint4* near;       // [NEAR / 8, dim / 16, 32]: cos and sin of so many positions on, high and low halves
    const float* query_map;  // [heads, dim, dim] of the layer, or null for none
    const float* output_map;
};

struct Batch {
    const Step* steps;
    int layer, batch, heads, group, quads, splits, dtype;  // dtype of exact tokens, see `number`
    int window;                                            // positions that a query sees, 0 for all
    float scaling;
};

struct PrepareArgs {
    Batch batch;
    Layout layout;
    const void* query;         // [batch, heads * group, dim]
    const void* added[SIDES];  // [batch, heads, dim] new keys and values; read where a sequence has a new place
    int dtype;                 // of both
    float* asked;              // out [batch, heads, quads, 4, dim], scaled
    float* framed;             // out, the same as it meets packed keys, times `factors`⁻¹
    uint4* fragments;          // out [batch, heads, quads, dim / 16, 32]
    float* turned;             // out [batch, heads, quads, 4, dim] coefficients of the means' cosines and sines
    float* factors;            // out [batch, heads, quads, 2, 4] of the fragments and of the coefficients
};

struct SplitArgs {
    Batch batch;
    Layout layout;
    const float* framed;
    const uint4* fragments;
    const float* turned;
    const float* factors;
    float* sums;    // out [batch, heads, quads, splits, 4, dim]
    float2* norms;  // out [batch, heads, quads, splits, 4] peak and mass
};

struct MergeArgs {
    Batch batch;
    Layout layout;
    const float* asked;
    const float* sums;
    const float2* norms;
    void* out;  // [batch, heads * group, dim]
    int out_dtype;
    float2* totals;  // out [batch, heads * group] peak and mass of all tokens
};

struct ObserveArgs {
    Batch batch;
    const float2* totals;
};

// Numbers of a type: 0 float16, 1 bfloat16, 2 float32.
QAQ_INLINE float number(const void* at, long long index, int dtype) {
    if (dtype == 2) return static_cast<const float*>(at)[index];
    const uint32_t bits = static_cast<const uint16_t*>(at)[index];
    if (dtype == 0) return floats_of(bits).x;
    union {
        uint32_t bits;
        float number;
    } wide = {bits << 16};
    return wide.number;
}
QAQ_INLINE void put_number(void* at, long long index, int dtype, float x) {
    if (dtype == 2) {
        static_cast<float*>(at)[index] = x;
    } else if (dtype == 0) {
        static_cast<uint16_t*>(at)[index] = static_cast<uint16_t>(half2_of(x, 0.f));
    } else {
        union {
            float number;
            uint32_t bits;
        } wide = {x};
        const bool nan = x != x;
        const uint32_t rounded = nan ? wide.bits | 1u << 22 : wide.bits + 0x7fff + (wide.bits >> 16 & 1);
        static_cast<uint16_t*>(at)[index] = static_cast<uint16_t>(rounded >> 16);
    }
}
QAQ_INLINE int bytes_of(int dtype) { return dtype == 2 ? 4 : 2; }

// Bytes of a row of a width, by its index into WIDTHS.
template <int DIM>
QAQ_INLINE int row_bytes(int width) {
    if (width == HALF_WIDTH) return 2 * DIM;
    return (width <= 8 ? width : 2 * width - 8) * (DIM / 16);
}
// Where the i-th exact token is.
QAQ_INLINE int exact_place(const Step& step, int i) {
    if (i < step.sinks || !step.ring) return i;
    const int at = step.ring_first + i - step.sinks;
    return step.sinks + (at >= step.ring ? at - step.ring : at);
}
QAQ_INLINE int length_of(const Sequence& one, const Step& step) { return one.tokens + step.exact_tokens; }
// Positions before it are out of the sliding window.
QAQ_INLINE int first_seen(const Batch& batch, const Sequence& one, const Step& step) {
    return batch.window ? max(0, length_of(one, step) - batch.window) : 0;
}
