// A decode step in one layer of several sequences: takes in each one's new token, attends, and brings the output back
// from the frame of the packed values. attention.h says what is attended to.
#pragma once
#include "attention.h"

extern "C" {

struct QaqDecode {
    int32_t type;                     // QaqType of what the model made
    const void *query, *key, *value;  // [count][heads][dim], the new token's, after RoPE
    float scaling;
    // [kv_heads][dim][dim]: a query times the first meets packed keys, a sum of packed values times the second is one of
    // values, but for their mean. Both null where rows are keys and values themselves.
    const float *query_map, *output_map;
    void* const* originals;  // [count] where the new token goes as it is, [2][kv_heads][dim]; or null
    float* scratch;          // [count][heads][4 * dim]
    float* out;              // [count][heads][dim]
};

// `layers` describe sequences that have the new token already: it is the last recent one, and is written there. Their
// queries and outputs are not read. 0, or -1 if memory for the scratch could not be had.
int qaq_decode(const QaqDecode* step, const QaqLayer* layers, int32_t count, int32_t threads);
}
