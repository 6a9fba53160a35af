// Decode attention of one query position over one layer of one sequence: the plain C interface.
//
// Tokens stand in position order as [sinks | packed | recent]. Packed rows lie in pools as qaq_core/quantization/bit_planes.py and
// pool.py describe them. Arrays are contiguous unless a stride is given; strides count elements.
#pragma once
#include <cstdint>

#include "interface.h"
#include "rotation.h"

extern "C" {

enum QaqReduction : int32_t { QAQ_NONE = 0, QAQ_MAX = 1, QAQ_MEAN_SQUARE = 2 };

// The pool of one block.
struct QaqPool {
    const uint8_t* const* base;  // [QAQ_WIDTHS] rows of all layers and heads of that width
    const int32_t* first;        // [kv_heads][QAQ_WIDTHS], the place among them of the layer's heads' first rows
};

// Keys or values.
struct QaqSide {
    const void* residual;  // [kv_heads][sinks + recent][dim] of QaqType
    int64_t residual_head_stride;
    const QaqPool* rows;  // [blocks]
    const uint8_t* order;   // [dim], the octet of each unit of a row
    int32_t split, parts;   // octets of the first scale; scales of a row, 1 or 2
    const uint8_t* meta;    // [kv_heads or 1][tokens] indices into `scales`, or null: see `scale`
    const float* scales;    // [256][parts]
    const float* scale;     // [kv_heads or 1][tokens][parts], where meta is null
    const float* offset;    // [kv_heads or 1][tokens] or null for 0
    int64_t affine_head_stride;  // in tokens, of meta, scale and offset; 0 where all heads share a row
    QaqRotation rotation;  // of the layer's heads
};

struct QaqLayer {
    int32_t kv_heads, group, dim, sinks, recent, packed, block_tokens;
    int32_t start;  // position of the first packed token
    int32_t first;  // first token that the query sees
    int32_t residual_type, reduction;
    const float* query;   // [kv_heads * group][dim], scaled; rows here and below stand `stride` floats apart
    const float* transformed;  // the same as it meets packed keys
    int64_t stride;
    const float* key_mean;    // [kv_heads][dim], before RoPE, or null for 0
    const float* value_mean;  // [kv_heads][dim], or null for 0
    const float* angles;  // [positions][dim] RoPE's cosines and sines, where there is a key_mean: from position 0 to
                          // 64 beyond the last packed token
    const uint8_t* tags;  // [kv_heads][packed]
    int64_t tags_head_stride;
    const float* levels;  // [9][256], of b bits at 256·b
    QaqSide key, value;
    float* out_residual;   // [kv_heads * group][dim], over sinks and recent tokens, and what centering took from packed values
    float* out_packed;  // [kv_heads * group][dim], over packed values in their frame
    float* observed;        // [kv_heads][tokens], the statistic, where one is asked for
};

// Attends in every one of `count` layers (one of each of several sequences), on up to `threads` threads, the caller
// being one of them. 0, or -1 if memory for the scratch could not be had.
int qaq_attend(const QaqLayer* layers, int32_t count, int32_t threads);
}
