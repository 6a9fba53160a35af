// Attention of an arriving prompt in one layer of a sequence: many query positions, causal, with running softmax.
// attention.h describes the tokens.
#pragma once
#include "attention.h"

extern "C" {

struct QaqPrompt {
    int32_t type;      // QaqType of the queries
    int32_t queries;   // they are at the last positions of the layer's tokens
    int32_t window;    // positions that a query sees, itself included; 0 for all
    int32_t distance;  // positions before a query from which on a token's share counts for its peak
    int32_t summed;    // of how many last queries shares are summed
    float scaling;
    const void* query;  // [kv_heads * group][queries][dim], after RoPE; strides of heads and queries in elements
    int64_t head_stride, query_stride;
    // As in QaqDecode: of packed rows, or null if they are not transformed.
    const float *query_map, *output_map;
    // A token's share of a query is its squared probability, averaged over the group. Both [kv_heads][tokens], or null.
    float *sums, *peaks;
    int64_t observed_stride;  // of their heads
    float* out;               // [queries][kv_heads * group][dim]
};

// The layer's query, transformed and outputs are not read, nor is its first token. Shares are added to the sums, and
// peaks are raised. Results do not depend on the number of threads. Returns 0 or a QaqRefusal.
int qaq_prompt(const QaqPrompt* prompt, const QaqLayer* layer, int32_t threads);
}
