// What a decoder layer does to few rows outside of attention: norms, products with weights, rotation, gates. All
// numbers are floats. A row's results do not depend on how many rows there are.
#pragma once
#include <cstdint>

extern "C" {

// One of several linear layers that take the same rows.
struct QaqWeights {
    const float* weight;  // [outputs][inputs]
    const float* bias;    // [outputs], or null
    int64_t outputs;
};

// Rows of queries, keys and values side by side, and where each goes.
struct QaqHeads {
    int32_t rows, query_heads, kv_heads, dim;
    const float* joint;                  // [rows][query_heads + 2 * kv_heads][dim]
    const float *query_norm, *key_norm;  // [dim], weights of norms before the rotation; or null
    float epsilon;
    const float *cos, *sin;      // [rows][dim]
    float *query, *key, *value;  // [rows][query_heads or kv_heads][dim]
};

enum QaqGate : int32_t { QAQ_SILU = 0, QAQ_GELU_TANH = 1 };

// All return 0 or a QaqRefusal. Sizes of rows are multiples of 16.

// x += added, if that is not null; then out = x / rms(x) * weight. x, added and out are [rows][size].
int qaq_norm(float* x, const float* added, const float* weight, float epsilon, int32_t rows, int32_t size, float* out);

// out = x · weightᵀ + bias, the outputs of `count` layers side by side: x [rows][inputs], out [rows][all outputs].
int qaq_multiply(const float* x, int32_t rows, int32_t inputs, const QaqWeights* weights, int32_t count, float* out,
                 int32_t threads);

// Rotates queries and keys by their positions, as Llama does: dimension d with d + dim / 2.
int qaq_rotate(const QaqHeads* heads);

// out = gate(first half) * second half: both [rows][2 * size], out [rows][size].
int qaq_gate(const float* both, int32_t gate, int32_t rows, int32_t size, float* out);
}
