// Generic code, and the loop over heads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <type_traits>
#include <memory>
#include <vector>

#include "isa.h"
#include "threads.h"

int qaq_attend(const QaqLayer* layers, int32_t count, int32_t threads) {
    const HeadAttention head_of = instruction_set().attend;
    int heads = 0;
    for (int i = 0; i < count; ++i) heads += layers[i].kv_heads;
    std::atomic<bool> failed{false};
    in_parallel(threads, heads, [&](int task) {
        int i = 0;
        for (; task >= layers[i].kv_heads; ++i) task -= layers[i].kv_heads;
        try {
            head_of(layers[i], task);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    return failed ? -1 : 0;
}
