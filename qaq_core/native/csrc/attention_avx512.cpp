// The same operation for AVX-512. Standard headers come before the pragma, so that no inline function that
// other files share is compiled for a machine that may not be there.
#include "isa.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <type_traits>
#include <memory>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,avx2,fma,f16c,popcnt")
#endif
#include <immintrin.h>

#define QAQ_AVX2
#define QAQ_AVX512
#include "attention512.inc"

void attend_avx512(const QaqLayer& layer, int head) { attend(layer, head); }

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
