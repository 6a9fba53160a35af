// What encode.inc gives for one instruction set.
#pragma once
#include "encode.h"
#include "widths.h"

constexpr int CHUNK = 48;     // rows that are framed together

// A row's original, its position, and where the row goes.
struct Transformed {
    const uint8_t* original;
    int64_t position;
    float* out;
};

// The i-th vector's place, in elements from the base.
inline int64_t place_of(const QaqSpan& span, int64_t i) {
    const int64_t run = i / span.tokens;
    return run / span.heads * span.strides[0] + run % span.heads * span.strides[1] + i % span.tokens * span.strides[2];
}

struct EncodeKernels {
    // Makes at most CHUNK rows of one layer and head. Returns whether all are finite.
    bool (*transform)(const QaqTransform& transform, int64_t place, int32_t type, const Transformed* transformed, int n);
    // Of rows begin..end-1, counted through all layers and heads.
    void (*rms)(const QaqSpan& rows, int64_t begin, int64_t end, int dim, int split, float* out);
    void (*encode)(const QaqEncode& job, int64_t begin, int64_t end);
};
