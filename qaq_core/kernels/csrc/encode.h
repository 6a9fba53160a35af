// From originals to rows, and from rows to bytes. transforms/linear.py and encoder.py in qaq_core/quantization define
// the results.
//
// A row has the same bits wherever it is made, so results do not depend on the instruction set, on threads or on the
// other rows of a call: products are summed in double precision, in the order of the original's dims, and rounded once.
// (The product of two floats is exact in double precision, whether or not it is fused with the sum.)
#pragma once
#include "interface.h"
#include "rotation.h"

extern "C" {

// Vectors [layers][heads][tokens][dim]. Strides are in elements; a vector is contiguous.
struct QaqSpan {
    void* base;
    int64_t layers, heads, tokens;
    int64_t strides[3];
};

// One side's tables of a linear transform.
struct QaqTransform {
    int32_t layers, kv_heads, dim, kinds;  // dim: a multiple of 8
    const float* matrices;                 // [layers][kv_heads][dim of the original][dim of the row]
    const float* means;                    // [layers][kv_heads][dim]
    const float* angles;  // [kinds][angles_stride / dim][dim], cosines and sines by position; null: means have no RoPE
    int64_t angles_stride;
    const int64_t* kind;   // [layers]
    QaqRotation rotation;  // of all layers' heads
};

// Transforms originals of a QaqType at consecutive positions from `start` on to rows of floats, which may overwrite
// originals that are floats. Returns the first layer with a row that is not finite, the number of layers if there is
// none, or a QaqRefusal.
int32_t qaq_transform(const QaqTransform* transform, const QaqSpan* originals, int32_t type, int64_t start,
                      const QaqSpan* rows, int32_t threads);

// Transforms n single rows: out [n][dim] of originals [n][dim]. `place` (layer · kv_heads + head) and `position` are by
// row; `order` lists the rows sorted by place. Returns 0 or a QaqRefusal, as the functions below.
int32_t qaq_transform_at(const QaqTransform* transform, int64_t n, const float* originals, const int64_t* place,
                         const int64_t* position, const int64_t* order, float* out);

// Root mean squares of n rows, of the dims before `split` and from it on: out [n][2], or [n] if split is dim. `count`
// is how many they are.
int32_t qaq_rms(const QaqSpan* rows, int32_t dim, int32_t split, float* out, int64_t count, int32_t threads);

// A codec's cells and the units of a row.
struct QaqCells {
    int32_t dim, split;    // split: dims of the first scale; dim if there is only one
    const float* edges;    // [256] ascending, the last infinite; a number's code is the number of edges below it
    const int32_t* below;  // [bins], the number of edges in lower bins; a bin has one edge at most
    float low, bins_per_unit;
    int32_t bins;
    const int64_t* units;  // [dim], 8 · octet + plane of each unit
};

// The bytes of n rows between two widths: those of width `want` that width `have` lacks. In half precision, all of
// them.
struct QaqEncode {
    QaqCells cells;
    QaqSpan rows;         // floats
    const float* scales;  // [n][2], or [n] if split is dim
    int64_t scale_count;  // how many they are
    const float* offset;  // [n], or null for 0
    const uint8_t* have;  // [n], in half bits
    const uint8_t* want;
    const int64_t* begin;  // [n], where a row's bytes begin in `out`
    uint8_t* out;
    int64_t out_bytes;
};

int32_t qaq_encode(const QaqEncode* job, int32_t threads);
}
