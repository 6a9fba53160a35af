// A decode step of one KV head (decode.h), for every instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "half.h"
#include "reflections.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

// Columns d to d + N·WIDE of out += rows · map, for H rows.
template <int H, int N>
void add_columns(const float* rows, const float* map, int dim, int d, float* out) {
    wide sums[H][N];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sums[h][j] = *reinterpret_cast<const wide_u*>(out + h * dim + d + j * WIDE);
    for (int i = 0; i < dim; ++i) {
        const float* entries = map + i * dim + d;
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            const wide column = *reinterpret_cast<const wide_u*>(entries + j * WIDE);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) sums[h][j] += rows[h * dim + i] * column;
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) *reinterpret_cast<wide_u*>(out + h * dim + d + j * WIDE) = sums[h][j];
}

template <int H>
void add_mapped(const float* rows, const float* map, int dim, float* out) {
    constexpr int N = H == 1 ? 4 : 2;  // enough independent sums to hide latency
    int d = 0;
    for (; d + N * WIDE <= dim; d += N * WIDE) add_columns<H, N>(rows, map, dim, d, out);
    for (; d < dim; d += WIDE) add_columns<H, 1>(rows, map, dim, d, out);
}

// out += rows · map, for `count` rows and a matrix [dim][dim].
void add_mapped(const float* rows, int count, const float* map, int dim, float* out) {
    for (; count >= 4; count -= 4, rows += 4 * dim, out += 4 * dim) add_mapped<4>(rows, map, dim, out);
    if (count == 3) add_mapped<3>(rows, map, dim, out);
    if (count == 2) add_mapped<2>(rows, map, dim, out);
    if (count == 1) add_mapped<1>(rows, map, dim, out);
}

// Writes a head's new key or value to the residual rows and, as it is, to `original` if that is not null.
void store_new_row(const QaqDecode& step, const QaqLayer& layer, const QaqSide& side, const void* rows, int at,
                   uint8_t* original) {
    const int dim = layer.dim, size = bytes_of(step.type), residual_size = bytes_of(layer.residual_type);
    const auto* source = static_cast<const uint8_t*>(rows);
    const int head = at % layer.kv_heads, last = layer.sinks + layer.recent - 1;
    auto* residual = static_cast<uint8_t*>(const_cast<void*>(side.residual)) +
                     (head * side.residual_head_stride + int64_t(last) * dim) * residual_size;
    source += int64_t(at) * dim * size;
    if (step.type == layer.residual_type)
        std::memcpy(residual, source, dim * size);
    else
        floats_to_halves(reinterpret_cast<const float*>(source), dim, residual);
    if (original) std::memcpy(original + int64_t(head) * dim * size, source, dim * size);
}

// KV head `head` of sequence i.
void decode(const QaqDecode& step, QaqLayer layer, int i, int head, void (*attend)(const QaqLayer&, int)) {
    const int dim = layer.dim, heads = layer.kv_heads * layer.group, size = bytes_of(step.type);
    auto* original = step.originals ? static_cast<uint8_t*>(step.originals[i]) : nullptr;
    store_new_row(step, layer, layer.key, step.key, i * layer.kv_heads + head, original);
    if (original) original += int64_t(layer.kv_heads) * dim * size;
    store_new_row(step, layer, layer.value, step.value, i * layer.kv_heads + head, original);

    float* query = step.scratch + int64_t(i) * 4 * heads * dim;
    float *transformed = query + heads * dim, *residual = transformed + heads * dim, *packed = residual + heads * dim;
    const int group = layer.group, first = head * group;
    for (int h = first; h < first + group; ++h) {
        float* own = query + h * dim;
        to_floats(step.type, static_cast<const uint8_t*>(step.query) + (int64_t(i) * heads + h) * dim * size, dim, own);
        for (int d = 0; d < dim; ++d) own[d] *= step.scaling;
    }
    const int64_t map = int64_t(head) * dim * dim;
    if (step.query_map && layer.packed) {
        std::fill_n(transformed + first * dim, group * dim, 0.0f);
        add_mapped(query + first * dim, group, step.query_map + map, dim, transformed + first * dim);
        if (layer.key.rotation.reflections)
            rotate_queries(layer.key.rotation, head, dim, transformed + first * dim, group);
    }
    layer.query = query;
    layer.transformed = step.query_map ? transformed : query;
    layer.stride = dim;
    layer.out_residual = residual;
    layer.out_packed = packed;
    attend(layer, head);
    float* out = step.out + (int64_t(i) * heads + first) * dim;
    float* sums = packed + first * dim;
    std::memcpy(out, residual + first * dim, sizeof(float) * group * dim);
    if (!layer.packed) return;
    if (layer.value.rotation.reflections) unrotate_sums(layer.value.rotation, head, dim, sums, group);
    if (step.output_map)
        add_mapped(sums, group, step.output_map + map, dim, out);
    else
        for (int d = 0; d < group * dim; ++d) out[d] += sums[d];
}

}  // namespace
QAQ_END_TARGET
