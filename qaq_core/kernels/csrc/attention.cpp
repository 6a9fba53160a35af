// The C interface of attention.h: a task for each KV head.
#include "attention.h"

#include <atomic>
#include <new>

#include "isa.h"
#include "threads.h"

int qaq_attend(const QaqLayer* layers, int32_t count, int32_t threads) {
    const AttendHead attend = instruction_set().attend;
    int heads = 0;
    for (int i = 0; i < count; ++i) heads += layers[i].kv_heads;
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
    return failed ? -1 : 0;
}
