// Generic code, and the choice of instruction set at run time.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <atomic>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "attention.inc"
#include "heads.h"
#include "threads.h"

#if defined(__x86_64__)
void qaq_attend_avx2(const QaqLayer& layer, int head);  // attention_avx2.cpp
static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#else
static void qaq_attend_avx2(const QaqLayer& layer, int head) { attend(layer, head); }
static bool has_avx2() { return false; }
#endif

static std::atomic<bool> use_avx2{has_avx2()};

int qaq_interface(void) { return QAQ_INTERFACE; }

const char* qaq_isa(void) { return use_avx2 ? "avx2" : "generic"; }

int qaq_use(const char* isa) {
    const bool wants_avx2 = std::strcmp(isa, "avx2") == 0;
    if (wants_avx2 ? !has_avx2() : std::strcmp(isa, "generic") != 0) return -1;
    use_avx2 = wants_avx2;
    return 0;
}

Chosen head_attention() {
    const bool is_avx2 = use_avx2;
    return {is_avx2 ? qaq_attend_avx2 : static_cast<HeadAttention>(attend), is_avx2};
}

int qaq_attend(const QaqLayer* layers, int32_t count, int32_t threads) {
    const HeadAttention head_of = head_attention().attend;
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
