// The rows of dense.h, for every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dense_kernels.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

// -- norms ------------------------------------------------------------------------------------------------

inline float sum_of_squares(const float* x, int size) {
    f8 sums[2] = {splat(0.0f), splat(0.0f)};
    for (int i = 0; i < size; i += 16)
        for (int j = 0; j < 2; ++j) {
            const f8 part = load(x + i + 8 * j);
            sums[j] += part * part;
        }
    return total(sums[0] + sums[1]);
}

// out = x / rms(x) * weight; out may be x.
inline void norm_row(const float* x, const float* weight, float epsilon, int size, float* out) {
    const f8 factor = splat(1.0f / std::sqrt(sum_of_squares(x, size) / size + epsilon));
    for (int i = 0; i < size; i += 8) store(out + i, load(x + i) * factor * load(weight + i));
}

void norm(float* x, const float* added, const float* weight, float epsilon, int rows, int size, float* out) {
    for (int r = 0; r < rows; ++r, x += size, out += size) {
        if (added)
            for (int i = 0; i < size; i += 8) store(x + i, load(x + i) + load(added + int64_t(r) * size + i));
        norm_row(x, weight, epsilon, size, out);
    }
}

// -- products ---------------------------------------------------------------------------------------------

// R rows with O outputs, R·O a multiple of 8. Every sum is made in the same order, whatever R and O are.
template <int R, int O>
void multiply_block(const float* x, int inputs, const float* weight, const float* bias, float* out, int64_t stride) {
    wide sums[R * O];
#pragma GCC unroll 16
    for (int k = 0; k < R * O; ++k) sums[k] = wide{};
    for (int i = 0; i < inputs; i += WIDE) {
        wide entries[O];
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) entries[o] = *reinterpret_cast<const wide_u*>(weight + int64_t(o) * inputs + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const wide row = *reinterpret_cast<const wide_u*>(x + int64_t(r) * inputs + i);
#pragma GCC unroll 8
            for (int o = 0; o < O; ++o) sums[r * O + o] += row * entries[o];
        }
    }
#pragma GCC unroll 2
    for (int k = 0; k < R * O; k += 8) {
        const f8 eight = totals(sums + k);
        for (int j = 0; j < 8; ++j) {
            const int r = (k + j) / O, o = (k + j) % O;
            out[r * stride + o] = bias ? eight[j] + bias[o] : eight[j];
        }
    }
}

// One row with one output.
void multiply_one(const float* x, int inputs, const float* weight, const float* bias, float* out) {
    wide sums[8] = {};
    for (int i = 0; i < inputs; i += WIDE)
        sums[0] += *reinterpret_cast<const wide_u*>(x + i) * *reinterpret_cast<const wide_u*>(weight + i);
    const float sum = totals(sums)[0];
    *out = bias ? sum + *bias : sum;
}

#ifdef QAQ_AVX512
constexpr int OUTPUTS = 4;  // with four rows: as many sums as leave registers for what they are made of
#else
constexpr int OUTPUTS = 2;
#endif

// Eight outputs of all rows: the weights come from memory once and stay in the first cache.
void multiply_eight(const float* x, int rows, int inputs, const float* weight, const float* bias, float* out,
                    int64_t stride) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        for (int o = 0; o < 8; o += OUTPUTS)
            multiply_block<4, OUTPUTS>(x + int64_t(r) * inputs, inputs, weight + int64_t(o) * inputs,
                                       bias ? bias + o : nullptr, out + r * stride + o, stride);
    if (r + 2 <= rows) {
        for (int o = 0; o < 8; o += 4)
            multiply_block<2, 4>(x + int64_t(r) * inputs, inputs, weight + int64_t(o) * inputs,
                                 bias ? bias + o : nullptr, out + r * stride + o, stride);
        r += 2;
    }
    if (r < rows) multiply_block<1, 8>(x + int64_t(r) * inputs, inputs, weight, bias, out + r * stride, stride);
}

void multiply(const float* x, int rows, int inputs, const QaqWeights& layer, int64_t begin, int64_t end, float* out,
              int64_t stride) {
    int64_t o = begin;
    for (; o + 8 <= end; o += 8)
        multiply_eight(x, rows, inputs, layer.weight + o * inputs, layer.bias ? layer.bias + o : nullptr, out + o,
                       stride);
    for (; o < end; ++o)
        for (int r = 0; r < rows; ++r)
            multiply_one(x + int64_t(r) * inputs, inputs, layer.weight + o * inputs,
                         layer.bias ? layer.bias + o : nullptr, out + r * stride + o);
}

// -- rotation ---------------------------------------------------------------------------------------------

void rotate_heads(const float* x, int count, int dim, const float* weight, float epsilon, const float* cos,
                  const float* sin, float* out) {
    const int half = dim / 2;
    for (int h = 0; h < count; ++h, x += dim, out += dim) {
        const float* from = x;
        if (weight) {
            norm_row(x, weight, epsilon, dim, out);
            from = out;
        }
        for (int d = 0; d < half; d += 8) {
            const f8 low = load(from + d), high = load(from + half + d);
            store(out + d, low * load(cos + d) - high * load(sin + d));
            store(out + half + d, high * load(cos + half + d) + low * load(sin + half + d));
        }
    }
}

void rotate(const QaqHeads& heads) {
    const int dim = heads.dim;
    const int64_t queries = int64_t(heads.query_heads) * dim, keys = int64_t(heads.kv_heads) * dim;
    for (int r = 0; r < heads.rows; ++r) {
        const float *row = heads.joint + r * (queries + 2 * keys), *cos = heads.cos + int64_t(r) * dim,
                    *sin = heads.sin + int64_t(r) * dim;
        rotate_heads(row, heads.query_heads, dim, heads.query_norm, heads.epsilon, cos, sin, heads.query + r * queries);
        rotate_heads(row + queries, heads.kv_heads, dim, heads.key_norm, heads.epsilon, cos, sin, heads.key + r * keys);
        std::memcpy(heads.value + r * keys, row + queries + keys, sizeof(float) * keys);
    }
}

// -- gates ------------------------------------------------------------------------------------------------

// 1 / (1 + e^-x)
inline f8 sigmoid(f8 x) {
    const f8 zero = splat(0.0f), power = exp8(x < zero ? x : -x);
    return (x < zero ? power : splat(1.0f)) / (power + 1.0f);
}

void gate(const float* both, int32_t kind, int rows, int size, float* out) {
    for (int r = 0; r < rows; ++r, both += 2 * int64_t(size), out += size)
        for (int i = 0; i < size; i += 8) {
            const f8 x = load(both + i);
            // GELU by tanh: (1 + tanh(y)) / 2 is the sigmoid of 2y.
            const f8 inner = kind == QAQ_SILU ? x : x * (x * x * 0.044715f + 1.0f) * 1.5957691216057308f;
            store(out + i, x * sigmoid(inner) * load(both + size + i));
        }
}

}  // namespace
QAQ_END_TARGET
