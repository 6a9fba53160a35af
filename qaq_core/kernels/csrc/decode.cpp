// The C interface of decode.h: a task for each KV head of each sequence.
#include "decode.h"

#include <atomic>
#include <new>

#include "checks.h"
#include "isa.h"
#include "threads.h"

// Why a step cannot be done, or 0. The sequences are of one model.
static int32_t refusal_of(const QaqDecode& step, const QaqLayer* layers, int32_t count) {
    if (any_null({step.query, step.key, step.value, step.scratch, step.out}) || !step.query_map != !step.output_map)
        return QAQ_NULL;
    if (!is_type(step.type)) return QAQ_RANGE;
    for (int i = 0; i < count; ++i) {
        const QaqLayer& layer = layers[i];
        if (const int32_t refusal = refusal_of(layer)) return refusal;
        if (layer.kv_heads != layers->kv_heads || layer.group != layers->group || layer.dim != layers->dim ||
            layer.sinks + layer.recent < 1)
            return QAQ_SIZE;
        if (layer.residual_type != step.type && (layer.residual_type != QAQ_HALF || step.type != QAQ_FLOAT))
            return QAQ_RANGE;
    }
    return 0;
}

int qaq_decode(const QaqDecode* step, const QaqLayer* layers, int32_t count, int32_t threads) {
    if (count < 0) return QAQ_SIZE;
    if (!count) return 0;
    if (any_null({step, layers})) return QAQ_NULL;
    if (const int32_t refusal = refusal_of(*step, layers, count)) return refusal;
    const InstructionSet& set = instruction_set();
    const int heads = layers[0].kv_heads;  // the same in all: they are one model's
    std::atomic<bool> failed{false};
    in_parallel(threads, count * heads, [&](int task) {
        try {
            set.decode(*step, layers[task / heads], task / heads, task % heads, set.attend);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    return failed ? QAQ_NO_MEMORY : 0;
}
