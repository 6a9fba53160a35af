// What entry points check of their arguments, once a call: pointers, sizes, and every index that says where something
// is read or written. Tables, such as the order of units, are checked where they are made.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "attention.h"
#include "encode.h"
#include "widths.h"

constexpr int64_t MOST = 1 << 30;                // what an int counts
constexpr int64_t MOST_ROWS = int64_t(1) << 39;  // of all layers, heads and tokens

inline bool any_null(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers)
        if (!pointer) return true;
    return false;
}

inline bool is_count(int64_t n) { return n >= 0 && n <= MOST; }
inline bool is_dim(int64_t dim) { return dim > 0 && dim <= MAX_DIM && dim % 8 == 0; }
inline bool is_type(int32_t type) { return type >= QAQ_HALF && type <= QAQ_FLOAT; }
inline bool is_shift(int32_t shift) { return shift == 0 || shift == 4; }
inline bool is_whole(const QaqRotation& rotation) {
    return !rotation.reflections || !any_null({rotation.before, rotation.after});
}

// Refusals of what a decode step and attention need of a layer, or 0.
int32_t refusal_of(const QaqLayer& layer);

// The same of an encoder's tables and vectors.
int32_t refusal_of(const QaqTransform& transform);
int32_t refusal_of(const QaqSpan& span);
