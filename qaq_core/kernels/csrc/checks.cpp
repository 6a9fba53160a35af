#include "checks.h"

static int32_t refusal_of(const QaqSide& side, const QaqLayer& layer) {
    if (side.residual_head_stride < 0 || side.affine_head_stride < 0) return QAQ_SIZE;
    if (layer.sinks + layer.recent && !side.residual) return QAQ_NULL;
    if (!layer.packed) return 0;
    if (any_null({side.rows, side.order}) || !is_whole(side.rotation)) return QAQ_NULL;
    if (side.meta ? !side.scales : !side.scale) return QAQ_NULL;
    if (side.split < 1 || side.split > layer.dim / 8 || side.parts < 1 || side.parts > 2) return QAQ_RANGE;
    return 0;
}

int32_t refusal_of(const QaqLayer& layer) {
    const int64_t tokens = int64_t(layer.sinks) + layer.recent + layer.packed;
    for (int32_t count : {layer.sinks, layer.recent, layer.packed, layer.start, layer.first})
        if (!is_count(count)) return QAQ_SIZE;
    if (layer.kv_heads < 1 || layer.group < 1 || !is_dim(layer.dim) || layer.dim % 16 || !is_count(tokens) ||
        !is_count(int64_t(layer.kv_heads) * layer.group * layer.dim) || layer.tags_head_stride < 0)
        return QAQ_SIZE;
    if (!is_type(layer.residual_type) || layer.reduction < QAQ_NONE || layer.reduction > QAQ_MEAN_SQUARE)
        return QAQ_RANGE;
    if (layer.reduction != QAQ_NONE && !layer.observed) return QAQ_NULL;
    if (layer.packed) {
        if (layer.block_tokens < 1 || int64_t(layer.block_tokens) * layer.blocks < layer.packed) return QAQ_SIZE;
        if (any_null({layer.tags, layer.levels}) || (layer.key_mean && !layer.angles)) return QAQ_NULL;
    }
    const int32_t keys = refusal_of(layer.key, layer);
    return keys ? keys : refusal_of(layer.value, layer);
}

int32_t refusal_of(const QaqTransform& transform) {
    if (transform.layers < 1 || transform.kv_heads < 1 || !is_dim(transform.dim) ||
        !is_count(int64_t(transform.layers) * transform.kv_heads) || transform.angles_stride < 0)
        return QAQ_SIZE;
    if (any_null({transform.matrices, transform.means}) || !is_whole(transform.rotation)) return QAQ_NULL;
    if (!transform.angles) return 0;
    if (!transform.kind) return QAQ_NULL;
    for (int layer = 0; layer < transform.layers; ++layer)
        if (transform.kind[layer] < 0 || transform.kind[layer] >= transform.kinds) return QAQ_RANGE;
    return 0;
}

int32_t refusal_of(const QaqSpan& span) {
    if (!is_count(span.layers) || !is_count(span.heads) || !is_count(span.tokens) ||
        !is_count(span.layers * span.heads) || span.layers * span.heads > MOST_ROWS / (span.tokens + 1))
        return QAQ_SIZE;
    if (span.layers * span.heads * span.tokens && !span.base) return QAQ_NULL;
    for (int64_t stride : span.strides)
        if (stride < 0) return QAQ_SIZE;
    return 0;
}
