#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "decode.inc"
#include "heads.h"
#include "threads.h"

int qaq_decode(const QaqDecode* step, const QaqLayer* layers, int32_t count, int32_t threads) {
    const Chosen chosen = head_attention();
    const auto run = chosen.is_avx2 ? qaq_decode_avx2 : decode;
    const int heads = layers[0].kv_heads;  // of all alike: they are one model's
    std::atomic<bool> failed{false};
    in_parallel(threads, count * heads, [&](int task) {
        try {
            run(*step, layers[task / heads], task / heads, task % heads, chosen.attend);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    return failed ? -1 : 0;
}
