// The C interface of decode.h: a task for each KV head of each sequence.
#include "decode.h"

#include <atomic>
#include <new>

#include "isa.h"
#include "threads.h"

int qaq_decode(const QaqDecode* step, const QaqLayer* layers, int32_t count, int32_t threads) {
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
    return failed ? -1 : 0;
}
