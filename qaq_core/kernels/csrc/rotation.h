// A sequence's own axes (qaq_core/quantization/transforms/rotation.py), to which rows are turned: y' = after · U · before · y.
#pragma once
#include <cstdint>

struct QaqRotation {
    // [heads][dim·(dim+1)/2 - 1], vectors of dim-1 reflections that leave one dim more alone each; null: rows stay.
    const int8_t* reflections;
    const float* before;  // [heads][octets]
    const float* after;   // [heads][octets]
};
