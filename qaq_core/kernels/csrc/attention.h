// Attention of one query position in one layer of a sequence.
//
// Tokens are in position order: [sinks | packed | recent]. Sinks and recent tokens are the residual rows. Packed rows
// lie in pools, see qaq_core/quantization/bit_planes.py and qaq_core/storage/pool.py. Arrays are contiguous unless a
// stride is given; strides count elements.
#pragma once
#include "interface.h"
#include "rotation.h"

extern "C" {

enum QaqReduction : int32_t { QAQ_NONE = 0, QAQ_MAX = 1, QAQ_MEAN_SQUARE = 2 };

// The pool of one block.
struct QaqPool {
    const uint8_t* const* base;  // [QAQ_WIDTHS], the rows of all layers and heads, by width
    const int32_t* first;  // [kv_heads][QAQ_WIDTHS], the index among them of the first row of each of the layer's heads
};

// Keys or values.
struct QaqSide {
    const void* residual;  // [kv_heads][sinks + recent][dim] of QaqType
    int64_t residual_head_stride;
    const QaqPool* rows;         // [blocks]
    const uint8_t* order;        // [dim], the octet of each unit of a row
    int32_t split, parts;        // split: octets of the first scale; parts: scales of a row, 1 or 2
    const uint8_t* meta;         // [kv_heads or 1][tokens] indices into `scales`, or null: see `scale`
    const float* scales;         // [256][parts]
    const float* scale;          // [kv_heads or 1][tokens][parts], where meta is null
    const float* offset;         // [kv_heads or 1][tokens] or null for 0
    int64_t affine_head_stride;  // in tokens, of meta, scale and offset; 0 if all heads share them
    QaqRotation rotation;        // of the layer's heads
};

struct QaqLayer {
    int32_t kv_heads, group, dim, sinks, recent, packed, block_tokens;
    int32_t blocks;  // of packed tokens
    int32_t start;   // position of the first packed token
    int32_t first;   // index of the first token that the query sees
    int32_t residual_type, reduction;
    const float* query;        // [kv_heads * group][dim], scaled; the stride of heads here and below is `stride`
    const float* transformed;  // the same, transformed for packed keys
    int64_t stride;
    const float* key_mean;    // [kv_heads][dim], before RoPE, or null for 0
    const float* value_mean;  // [kv_heads][dim], or null for 0
    const float* angles;      // [positions][dim], RoPE's cosines and sines, if there is a key_mean: up to 64 positions
                              // beyond the last packed token
    const uint8_t* tags;      // [kv_heads][packed]
    int64_t tags_head_stride;
    const float* levels;  // [9][256], of b bits at 256·b
    QaqSide key, value;
    float* out_residual;  // [kv_heads * group][dim], from residual values and the mean of packed ones
    float* out_packed;    // [kv_heads * group][dim], from packed values, transformed as they are
    float* observed;      // [kv_heads][tokens], the attention statistic, if there is a reduction
    float* log_sums;      // [kv_heads * group], log Σ e^score of each query head, or null
};

// Attends in `count` layers, one of each of several sequences, on up to `threads` threads including the caller's.
// Returns 0 or a QaqRefusal.
int qaq_attend(const QaqLayer* layers, int32_t count, int32_t threads);
}
