// A decode step of several sequences in one layer: stores each one's new token, attends, and transforms outputs back.
// attention.h describes the tokens.
#pragma once
#include "attention.h"

extern "C" {

struct QaqDecode {
    int32_t type;                     // QaqType of query, key and value
    const void *query, *key, *value;  // [count][heads][dim], of the new tokens, after RoPE
    float scaling;
    // [kv_heads][dim][dim]: query_map takes a query to the basis of packed keys, output_map a sum of packed values back
    // to that of values, without their mean. Both null if packed rows are not transformed.
    const float *query_map, *output_map;
    void* const* originals;  // [count], where the new token goes as it is, [2][kv_heads][dim]; or null
    float* scratch;          // [count][heads][4 * dim]
    float* out;              // [count][heads][dim]
};

// `layers` describe the sequences with the new token, which is the last recent one and is written there. Their queries
// and outputs are not read. Returns 0 or a
// QaqRefusal.
int qaq_decode(const QaqDecode* step, const QaqLayer* layers, int32_t count, int32_t threads);
}
