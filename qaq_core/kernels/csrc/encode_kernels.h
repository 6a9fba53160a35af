// The operations of encode.h that are compiled for each instruction set.
#pragma once
#include "encode.h"
#include "widths.h"

constexpr int ROW_CHUNK = 48;  // rows that are transformed together

// A row to make: its original, its position, and where it goes.
struct RowToMake {
    const uint8_t* original;
    int64_t position;
    float* out;
};

// The offset of vector i, in elements from the base.
inline int64_t offset_of(const QaqSpan& span, int64_t i) {
    const int64_t head = i / span.tokens;  // of all layers
    return head / span.heads * span.strides[0] + head % span.heads * span.strides[1] +
           i % span.tokens * span.strides[2];
}

struct EncodeKernels {
    // See transform_rows.h.
    bool (*transform)(const QaqTransform& transform, int64_t place, int32_t type, const RowToMake* rows, int n);
    // See encode_rows.h. Rows begin to end - 1 are counted through all layers and heads.
    void (*rms)(const QaqSpan& rows, int64_t begin, int64_t end, int dim, int split, float* out);
    void (*encode)(const QaqEncode& job, int64_t begin, int64_t end);
};
