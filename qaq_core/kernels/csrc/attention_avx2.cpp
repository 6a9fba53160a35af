// The same operation for AVX2, FMA and F16C. Standard headers come before the pragma, so that no inline function that
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define QAQ_AVX2
#include "attention.inc"

void attend_avx2(const QaqLayer& layer, int head) { attend(layer, head); }

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
