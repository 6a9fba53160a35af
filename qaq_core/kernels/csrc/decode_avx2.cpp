// The same work for AVX2, FMA and F16C. Standard headers come before the pragma, so that no inline function that other
// files share is compiled for a machine that may not be there.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "isa.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define QAQ_AVX2
#include "decode.inc"

void decode_avx2(const QaqDecode& step, QaqLayer layer, int i, int head, HeadAttention attend) {
    decode(step, layer, i, head, attend);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
