// A sequence's rotation (qaq_core/quantization/transforms/rotation.py): y' = after · U · before · y.
#pragma once
#include <cstdint>

struct QaqRotation {
    // [heads][dim·(dim+1)/2 - 1], vectors of dim-1 reflections, each of one dim less; null: no rotation.
    const int8_t* reflections;
    const float* before;  // [heads][octets], R, factors before the reflections
    const float* after;   // [heads][octets], L, factors after them
};
