// The C interface of attention.h: a task for each KV head.
#include "attention.h"

#include <atomic>
#include <new>

#include "checks.h"
#include "isa.h"
#include "threads.h"

int qaq_attend(const QaqLayer* layers, int32_t count, int32_t threads) {
    const AttendHead attend = instruction_set().attend;
    if (count < 0) return QAQ_SIZE;
    if (count && !layers) return QAQ_NULL;
    int heads = 0;
    for (int i = 0; i < count; ++i) {
        const QaqLayer& layer = layers[i];
        if (const int32_t refusal = refusal_of(layer)) return refusal;
        if (any_null({layer.query, layer.out_residual}) ||
            (layer.packed && any_null({layer.transformed, layer.out_packed})))
            return QAQ_NULL;
        if (layer.stride < layer.dim) return QAQ_SIZE;
        heads += layer.kv_heads;
    }
    std::atomic<bool> failed{false};
    in_parallel(threads, heads, [&](int task) {
        int i = 0;
        for (; task >= layers[i].kv_heads; ++i) task -= layers[i].kv_heads;
        try {
            attend(layers[i], task);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    return failed ? QAQ_NO_MEMORY : 0;
}
