// What kernels use of a GPU; with QAQ_EMULATE, of a CPU that pretends to be one.
#pragma once
#ifdef QAQ_EMULATE
#include "emulate.h"
#else
#include <cuda_fp16.h>
#include <stdint.h>
#endif

#define QAQ_INLINE __device__ __forceinline__

#ifndef QAQ_EMULATE
// Four bytes of eight, by the nibbles of `selector`, whose top bits are 0.
QAQ_INLINE uint32_t pick(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(selector));
    return found;
}
// c += a·b of a warp: 16 rows, 8 columns, 16 products each; halves, added in float32.
QAQ_INLINE void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
QAQ_INLINE uint32_t half2_of(float x, float y) {
    const __half2 halves = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&halves);
}
QAQ_INLINE float2 floats_of(uint32_t halves) { return __half22float2(*reinterpret_cast<__half2*>(&halves)); }
QAQ_INLINE float quotient(float x, float y) { return __fdividef(x, y); }
// Of memory that nothing writes while the kernel runs.
template <class T>
QAQ_INLINE T read(const void* at) {
    return __ldg(static_cast<const T*>(at));
}
constexpr uint32_t ALL = 0xffffffffu;
template <class T>
QAQ_INLINE T from_lane(T value, int lane) {
    return __shfl_sync(ALL, value, lane);
}
template <class T>
QAQ_INLINE T across(T value, int mask) {
    return __shfl_xor_sync(ALL, value, mask);
}
template <class T>
QAQ_INLINE T from_below(T value, int step) {
    return __shfl_up_sync(ALL, value, step);
}
// Which lanes of the warp have the same value.
QAQ_INLINE uint32_t alike(uint32_t value) { return __match_any_sync(ALL, value); }
#endif

// Read anew wherever it is asked for, so that no register keeps it in between.
QAQ_INLINE int thread_index() {
#ifdef QAQ_EMULATE
    return threadIdx.x;
#else
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
#endif
}
QAQ_INLINE int lane_index() { return thread_index() & 31; }

#ifdef QAQ_EMULATE
QAQ_INLINE float power_of_two(float x) { return x < -126.f ? 0.f : exp2f(x); }
#else
QAQ_INLINE float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
#endif
// e^x; 0 where that is less than 2^-126.
QAQ_INLINE float power_of_e(float x) { return power_of_two(x * 1.4426950408889634f); }

QAQ_INLINE float sum_of_warp(float x) {
    for (int step = 16; step; step /= 2) x += across(x, step);
    return x;
}
QAQ_INLINE float most_of_warp(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, across(x, step));
    return x;
}

// Two numbers as halves, or what those lack of the numbers: both together lose nothing that matters.
QAQ_INLINE uint32_t halves_of(float x, float y, bool low) {
    const uint32_t high = half2_of(x, y);
    const float2 had = floats_of(high);
    return low ? half2_of(x - had.x, y - had.y) : high;
}

// The power of two that is next to 1 / x from below; 1 for 0, infinity and NaN.
QAQ_INLINE float inverse_power(float x) {
    if (!(x > 0.f && x <= 3e38f)) return 1.f;
    int exponent;
    frexpf(x, &exponent);
    return ldexpf(1.f, -max(-100, min(100, exponent)));
}
