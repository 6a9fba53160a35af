// The same operations for AVX-512; see attention_avx2.cpp for why headers come first.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,avx2,fma,f16c,popcnt")
#endif
#include <immintrin.h>

#define QAQ_AVX2
#define QAQ_AVX512
#include "encode.inc"

const EncodeKernels encode_avx512{frame_rows, rms_rows, encode_rows};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
