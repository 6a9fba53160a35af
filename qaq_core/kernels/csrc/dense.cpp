// The C interface of dense.h.
#include "dense.h"

#include <algorithm>

#include "checks.h"
#include "isa.h"
#include "threads.h"

static constexpr int64_t OUTPUTS_OF_A_TASK = 64;

static bool is_size(int64_t size) { return is_count(size) && size > 0 && size % 16 == 0; }

int qaq_norm(float* x, const float* added, const float* weight, float epsilon, int32_t rows, int32_t size, float* out) {
    if (!is_count(rows) || !is_size(size)) return QAQ_SIZE;
    if (any_null({x, weight, out})) return QAQ_NULL;
    instruction_set().dense.norm(x, added, weight, epsilon, rows, size, out);
    return 0;
}

int qaq_multiply(const float* x, int32_t rows, int32_t inputs, const QaqWeights* weights, int32_t count, float* out,
                 int32_t threads) {
    if (!is_count(rows) || !is_size(inputs) || !is_count(count)) return QAQ_SIZE;
    if (any_null({x, weights, out})) return QAQ_NULL;
    int64_t stride = 0, tasks = 0;
    for (int i = 0; i < count; ++i) {
        if (!is_count(weights[i].outputs)) return QAQ_SIZE;
        if (weights[i].outputs && !weights[i].weight) return QAQ_NULL;
        stride += weights[i].outputs;
        tasks += (weights[i].outputs + OUTPUTS_OF_A_TASK - 1) / OUTPUTS_OF_A_TASK;
    }
    if (!is_count(stride)) return QAQ_SIZE;
    const DenseKernels& kernels = instruction_set().dense;
    in_parallel(threads, int(tasks), [&](int task) {
        const QaqWeights* layer = weights;
        int64_t begin = task * OUTPUTS_OF_A_TASK, column = 0;
        for (; begin >= layer->outputs; ++layer) {
            begin -= (layer->outputs + OUTPUTS_OF_A_TASK - 1) / OUTPUTS_OF_A_TASK * OUTPUTS_OF_A_TASK;
            column += layer->outputs;
        }
        kernels.multiply(x, rows, inputs, *layer, begin, std::min(begin + OUTPUTS_OF_A_TASK, layer->outputs),
                         out + column, stride);
    });
    return 0;
}

int qaq_rotate(const QaqHeads* heads) {
    if (!heads) return QAQ_NULL;
    if (!is_count(heads->rows) || !is_count(heads->query_heads) || !is_count(heads->kv_heads) || !is_dim(heads->dim) ||
        !is_size(heads->dim))
        return QAQ_SIZE;
    if (any_null({heads->joint, heads->cos, heads->sin, heads->query, heads->key, heads->value})) return QAQ_NULL;
    instruction_set().dense.rotate(*heads);
    return 0;
}

int qaq_gate(const float* both, int32_t gate, int32_t rows, int32_t size, float* out) {
    if (!is_count(rows) || !is_size(size)) return QAQ_SIZE;
    if (gate != QAQ_SILU && gate != QAQ_GELU_TANH) return QAQ_RANGE;
    if (any_null({both, out})) return QAQ_NULL;
    instruction_set().dense.gate(both, gate, rows, size, out);
    return 0;
}
