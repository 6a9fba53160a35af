// The instruction set that kernels are compiled for.
//
// Kernels are headers. Each is compiled once per instruction set, in translation units of their own. A unit chooses the
// set before its includes: `#define QAQ_AVX512`, `#define QAQ_AVX2`, or neither for code that runs on any processor.
//
// In a kernel header, code stands between QAQ_BEGIN_TARGET and QAQ_END_TARGET, in an unnamed namespace. Internal
// linkage keeps the linker from merging functions of different instruction sets. Includes stand outside, so that inline
// functions of the standard library, which all units share, are compiled for any processor.
#pragma once

#if defined(QAQ_AVX512)
#define QAQ_AVX2
#define QAQ_TARGET \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,avx2,fma,f16c,popcnt"  // as in isa.cpp
#elif defined(QAQ_AVX2)
#define QAQ_TARGET "avx2,fma,f16c"
#endif

#define QAQ_STRING(...) #__VA_ARGS__
#define QAQ_PRAGMA(...) _Pragma(QAQ_STRING(__VA_ARGS__))

#if !defined(QAQ_TARGET)
#define QAQ_BEGIN_TARGET
#define QAQ_END_TARGET
#elif defined(__clang__)
#define QAQ_BEGIN_TARGET QAQ_PRAGMA(clang attribute push(__attribute__((target(QAQ_TARGET))), apply_to = function))
#define QAQ_END_TARGET QAQ_PRAGMA(clang attribute pop)
#else
#define QAQ_BEGIN_TARGET QAQ_PRAGMA(GCC push_options) QAQ_PRAGMA(GCC target(QAQ_TARGET))
#define QAQ_END_TARGET QAQ_PRAGMA(GCC pop_options)
#endif

#if defined(QAQ_AVX2)
#include <immintrin.h>
#endif

// For loops that need all registers.
#define QAQ_NOINLINE __attribute__((noinline))
