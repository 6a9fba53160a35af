// The tokens of a KV head as floats: residual rows as they are, packed rows unpacked and transformed back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "code_rows_generic.h"
#include "half.h"
#include "layout.h"
#include "products.h"
#include "prompt_kernels.h"
#include "reflections.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

// One side of a KV head.
struct PromptSide {
    const QaqPrompt& prompt;
    const QaqLayer& layer;
    int head, index;

    const QaqSide& side() const { return index ? layer.value : layer.key; }
    int dim() const { return layer.dim; }

    // basis [dim][dim]: a packed row times it is a key or a value without its mean. Returns whether there is one.
    bool basis(float* basis, float* scratch) const {
        const float* map = index ? prompt.output_map : prompt.query_map;
        if (!map) return false;
        const int n = dim();
        map += int64_t(head) * n * n;
        std::fill(scratch, scratch + n * n, 0.0f);
        for (int d = 0; d < n; ++d) scratch[d * n + d] = 1;
        if (side().rotation.reflections) unrotate_sums(side().rotation, head, n, scratch, n);
        // Sums of values are multiplied with output_map, queries with query_map; so keys are with its transpose.
        std::vector<float> turned;
        if (!index) {
            turned.resize(size_t(n) * n);
            for (int d = 0; d < n; ++d)
                for (int e = 0; e < n; ++e) turned[e * n + d] = map[d * n + e];
            map = turned.data();
        }
        multiply_all(scratch, n, map, basis);
        return true;
    }

    // out [n][dim] = rows [n][dim] · matrix [dim][dim]
    void multiply_all(const float* rows, int n, const float* matrix, float* out) const {
        const Strided a{rows, dim(), 1};
        int d = 0;
        for (; d + 2 * WIDE <= dim(); d += 2 * WIDE) multiply<2>(a, n, matrix + d, dim(), dim(), out + d, nullptr);
        for (; d < dim(); d += WIDE) multiply<1>(a, n, matrix + d, dim(), dim(), out + d, nullptr);
    }

    // Unpacks packed tokens first..last-1 of one block to `rows`. `seen` counts the block's rows of each width so far.
    void unpack_rows(const Layout& layout, int block, int first, int last, int64_t* seen, float* rows) const {
        const QaqSide& mine = side();
        const QaqPool& pool = mine.rows[block];
        const uint8_t* tags = layer.tags + head * layer.tags_head_stride;
        float scales[TILE + 1] = {};
        for (int t = first; t < last; ++t, rows += dim()) {
            const int width = tags[t] >> (index ? 4 : 0) & 15;
            const int64_t at = head * mine.affine_head_stride + t;
            const float* scale = mine.meta ? mine.scales + mine.meta[at] * mine.parts : mine.scale + at * mine.parts;
            scales[0] = scale[0], scales[TILE] = scale[mine.parts - 1];
            if (!width || width >= QAQ_WIDTHS || !pool.base[width]) {
                std::fill(rows, rows + dim(), 0.0f);
            } else {
                const int64_t row = pool.first[head * QAQ_WIDTHS + width] + seen[width]++;
                unpack(Tile{pool.base[width] + row * layout.row_bytes(width), width, 1, true, scales}, layout, rows);
            }
            if (mine.offset)
                for (int d = 0; d < dim(); ++d) rows[d] += mine.offset[at];
        }
    }

    // Adds the mean to rows from packed token t on.
    void add_mean(int t, int n, float* rows) const {
        const float* mean = index ? layer.value_mean : layer.key_mean;
        if (!mean) return;
        mean += head * dim();
        const int half = dim() / 2;
        for (int i = 0; i < n; ++i, rows += dim()) {
            const float* angle = layer.angles + int64_t(layer.start + t + i) * dim();
            for (int d = 0; d < half; ++d) {
                const float c = index ? 1 : angle[d], s = index ? 0 : angle[half + d];
                rows[d] += mean[d] * c - mean[half + d] * s;
                rows[half + d] += mean[half + d] * c + mean[d] * s;
            }
        }
    }

    // Packed tokens first..last-1, which begin and end where tiles or blocks do.
    void packed(int first, int last, float* rows) const {
        const size_t area = size_t(dim()) * dim();
        std::vector<float> memory(2 * area + size_t(TILE) * dim());
        float *matrix = memory.data(), *tile = matrix + 2 * area;
        const bool mapped = basis(matrix, matrix + area);
        const Layout layout(side().order, dim(), side().split, layer.levels);
        const uint8_t* tags = layer.tags + head * layer.tags_head_stride;
        for (int t = first; t < last;) {
            const int block = t / layer.block_tokens, begin = block * layer.block_tokens;
            const int end = std::min(last, begin + layer.block_tokens);
            int64_t seen[16] = {};
            for (int i = begin; i < t; ++i) ++seen[tags[i] >> (index ? 4 : 0) & 15];
            for (; t < end; t += TILE) {
                const int n = std::min(TILE, end - t);
                float* to = rows + int64_t(t - first) * dim();
                unpack_rows(layout, block, t, t + n, seen, mapped ? tile : to);
                if (mapped) multiply_all(tile, n, matrix, to);
                add_mean(t, n, to);
            }
            t = end;
        }
    }

    void residual(int first, int last, float* rows) const {
        const int size = bytes_of(layer.residual_type);
        const auto* from = static_cast<const uint8_t*>(side().residual) + head * side().residual_head_stride * size;
        for (int t = first; t < last; ++t, rows += dim())
            to_floats(layer.residual_type, from + int64_t(t) * dim() * size, dim(), rows);
    }
};

// See PromptKernels.
void prompt_rows(const QaqPrompt& prompt, const QaqLayer& layer, int head, int side, int first, int last, float* rows) {
    const PromptSide one{prompt, layer, head, side};
    const int begin = layer.sinks, end = layer.sinks + layer.packed;
    const auto part = [&](int from, int to, auto visit) {
        from = std::max(from, first), to = std::min(to, last);
        if (from < to) visit(from, to, rows + int64_t(from - first) * layer.dim);
    };
    part(0, begin, [&](int from, int to, float* out) { one.residual(from, to, out); });
    part(begin, end, [&](int from, int to, float* out) { one.packed(from - begin, to - begin, out); });
    part(end, end + layer.recent,
         [&](int from, int to, float* out) { one.residual(from - layer.packed, to - layer.packed, out); });
}

}  // namespace
QAQ_END_TARGET
