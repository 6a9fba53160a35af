// How originals become rows, and rows bytes: the plain C interface. frames.py and encoding.py define what is done.
//
// A row must be the same bits wherever it is made, so nothing here depends on the instruction set, on threads or on
// what else is made in the same call: a row's products are summed in double precision, one dim of the original after
// the other, and rounded once. (Products of two floats are exact in double precision, fused with the sum or not.)
#pragma once
#include <cstdint>

#include "rotation.h"

extern "C" {

// Vectors [layers][heads][tokens][dim]; strides in elements, those of one vector are contiguous.
struct QaqSpan {
    void* base;
    int64_t layers, heads, tokens;
    int64_t strides[3];
};

// A linear frame's tables of one side.
struct QaqTransform {
    int32_t kv_heads, dim;   // dim: a multiple of 8
    const float* matrices;   // [layers][kv_heads][dim of the original][dim of the row]
    const float* means;      // [layers][kv_heads][dim]
    const float* angles;     // [kinds][angles_stride / dim][dim], cosines and sines by position; null: means stay
    int64_t angles_stride;
    const int64_t* kind;     // [layers]
    QaqRotation rotation;            // of all layers' heads
};

// Rows of consecutive positions from `start` on, floats, of originals of QaqType; they may be written over originals
// that are floats too. Returns the first layer with a row that is not finite, or the number of layers.
int32_t qaq_rows(const QaqTransform* transform, const QaqSpan* originals, int32_t type, int64_t start, const QaqSpan* rows,
                 int32_t threads);

// Rows of anywhere: out [n][dim] of originals [n][dim]. `place` (layer · kv_heads + head) and `position` are those of
// each; `order` lists the rows so that equal places stand together.
void qaq_rows_at(const QaqTransform* transform, int64_t n, const float* originals, const int64_t* place,
                 const int64_t* position, const int64_t* order, float* out);

// Root mean squares of n rows, of the dims before and from `split` on: out [n][2], or [n] if split is dim.
void qaq_rms(const QaqSpan* rows, int32_t dim, int32_t split, float* out, int32_t threads);

// A codec's cells and the units of a row.
struct QaqCells {
    int32_t dim, split;    // dims of the first scale; dim if there is only one
    const float* edges;    // [256] ascending, the last infinite: a number's code is how many are less than it
    const int32_t* below;  // [bins] edges in lower bins than this one; a bin holds one edge at most
    float low, bins_per_unit;
    int32_t bins;
    const int64_t* units;  // [dim], 8 · octet + plane of each unit
};

// Bytes of rows that those of width `want` have and those of width `have` lack, all of half precision.
struct QaqEncode {
    QaqCells cells;
    QaqSpan rows;         // n of them, floats
    const float* scales;  // [n][2], or [n] if split is dim
    const float* offset;  // [n], or null for 0
    const uint8_t* have;  // [n], in half bits
    const uint8_t* want;
    const int64_t* begin;  // [n], where a row's bytes begin in `out`
    uint8_t* out;
};

void qaq_encode(const QaqEncode* job, int32_t threads);
}
