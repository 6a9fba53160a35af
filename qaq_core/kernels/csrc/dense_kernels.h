// The operations of dense.h that are compiled for each instruction set.
#pragma once
#include "dense.h"

struct DenseKernels {
    // See dense_rows.h.
    void (*norm)(float* x, const float* added, const float* weight, float epsilon, int rows, int size, float* out);
    // Outputs begin to end - 1 of one layer; rows of `out` are `stride` apart.
    void (*multiply)(const float* x, int rows, int inputs, const QaqWeights& layer, int64_t begin, int64_t end,
                     float* out, int64_t stride);
    void (*rotate)(const QaqHeads& heads);
    void (*gate)(const float* both, int32_t gate, int rows, int size, float* out);
};
