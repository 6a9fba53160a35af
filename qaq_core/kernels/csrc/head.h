// A KV head of a layer, with the loops over its tokens that all instruction sets share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "half.h"
#include "layout.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

struct HeadOfLayer {
    const QaqLayer& layer;
    int head, length;

    int64_t row(int g) const { return (int64_t(head) * layer.group + g) * layer.stride; }
    const float* query(int g) const { return layer.query + row(g); }
    const float* transformed(int g) const { return layer.transformed + row(g); }

    // Calls visit(block, its first packed token) for the blocks that the query sees.
    template <typename Visit>
    void each_block(Visit visit) const {
        for (int begin = 0, block = 0; begin < layer.packed; begin += layer.block_tokens, ++block)
            if (std::min(begin + layer.block_tokens, layer.packed) + layer.sinks > layer.first) visit(block, begin);
    }

    // Calls visit(first position, n) for the residual rows, TILE at a time, as `floats` [TILE][dim].
    template <typename Visit>
    void each_residual_tile(const QaqSide& side, float* floats, Visit visit) const {
        const int dim = layer.dim, size = bytes_of(layer.residual_type), tokens = layer.sinks + layer.recent;
        const uint8_t* rows = static_cast<const uint8_t*>(side.residual) + head * side.residual_head_stride * size;
        for (int t = 0; t < tokens;) {
            const int some = std::min(TILE, (t < layer.sinks ? layer.sinks : tokens) - t);
            for (int i = 0; i < some; ++i) {
                to_floats(layer.residual_type, rows + int64_t(t + i) * dim * size, dim, floats + i * dim);
            }
            visit(t < layer.sinks ? t : t + layer.packed, some);
            t += some;
        }
    }
};

}  // namespace
QAQ_END_TARGET
