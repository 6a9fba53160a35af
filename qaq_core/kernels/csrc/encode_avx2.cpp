// The same operations for AVX2, FMA and F16C; see attention_avx2.cpp for why headers come first.
#include "encode.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define QAQ_AVX2
#include "encode.inc"

const EncodeKernels encode_avx2{transform_rows, rms_rows, encode_rows};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
