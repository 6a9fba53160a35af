// CUDA's threads on a CPU: a fiber for each thread of a block, of which warps meet at shuffles and products of
// matrices, and blocks at barriers. It shows what kernels compute. It shows no race between warps, and no time.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
using std::max;
using std::min;

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct dim3 {
    int x, y, z;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulated {

#if defined(__x86_64__)
// Saves what a call preserves on the stack that is left, and takes it from the other one.
extern "C" void qaq_switch(void** from, void* to);
asm(R"(
.text
.weak qaq_switch
qaq_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");
#endif

constexpr size_t STACK = 128 << 10;

struct Fiber {
    std::vector<char> stack;
    bool done;
#if defined(__x86_64__)
    void* at;
#else
    ucontext_t at;
#endif
};
struct Meeting {
    int arrived = 0;
    unsigned generation = 0;
};
struct Product {
    float* c;
    uint4 a;
    uint32_t b0, b1;
};

inline std::vector<Fiber> fibers;
inline Fiber home;
inline int current;
inline Meeting whole;
inline std::vector<Meeting> warps;
inline std::vector<uint64_t> shown;
inline std::vector<Product> products;
inline std::function<void()> body;
inline dim3 block_index, grid_size;

inline void change(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
    qaq_switch(&from.at, to.at);
#else
    swapcontext(&from.at, &to.at);
#endif
}
inline void yield() { change(fibers[current], home); }
template <class Last>
void meet(Meeting& meeting, int size, Last last) {
    const unsigned mine = meeting.generation;
    if (++meeting.arrived == size) {
        last();
        meeting.arrived = 0;
        meeting.generation++;
        return;
    }
    while (meeting.generation == mine) yield();
}
inline void meet_warp() {
    meet(warps[current / 32], 32, [] {});
}
inline void start() {
    body();
    fibers[current].done = true;
    yield();
}
inline void begin(Fiber& fiber) {
    fiber.done = false;
    fiber.stack.resize(STACK);
#if defined(__x86_64__)
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.data() + STACK) & ~uintptr_t(15);
    auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, where to begin, and a place for alignment
    std::fill(frame, frame + 8, nullptr);
    frame[6] = reinterpret_cast<void*>(&start);
    fiber.at = frame;
#else
    getcontext(&fiber.at);
    fiber.at.uc_stack.ss_sp = fiber.stack.data();
    fiber.at.uc_stack.ss_size = STACK;
    fiber.at.uc_link = nullptr;
    makecontext(&fiber.at, start, 0);
#endif
}

// Runs a block's threads, each of which does `each`, until all are done.
inline void run_block(int threads, const std::function<void()>& each) {
    body = each;
    fibers.resize(threads);
    warps.assign(threads / 32, {});
    whole = {};
    shown.assign(threads, 0);
    products.resize(threads);
    for (auto& fiber : fibers) begin(fiber);
    for (bool busy = true; busy;) {
        busy = false;
        for (current = 0; current < threads; current++)
            if (!fibers[current].done) {
                busy = true;
                change(home, fibers[current]);
            }
    }
}

// What the lane that `from` names has of `value`.
template <class T, class From>
T shuffled(T value, From from) {
    const int me = current, warp = me / 32;
    uint64_t raw = 0;
    memcpy(&raw, &value, sizeof value);
    shown[me] = raw;
    meet_warp();
    raw = shown[warp * 32 + from(me % 32)];
    memcpy(&value, &raw, sizeof value);
    meet_warp();
    return value;
}

inline float half_float(uint32_t bits) {
    const auto low = static_cast<uint16_t>(bits);
    _Float16 half;
    memcpy(&half, &low, 2);
    return static_cast<float>(half);
}
inline uint32_t float_half(float x) {
    const auto half = static_cast<_Float16>(x);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

// D = A·B + C of a warp's mma.m16n8k16.
inline void multiply(int warp) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Product& one = products[warp * 32 + lane];
        const int n = lane / 4, q = lane % 4;
        const uint32_t parts[4] = {one.a.x, one.a.y, one.a.z, one.a.w};
        for (int e = 0; e < 2; e++) {
            for (int r = 0; r < 4; r++) a[n + 8 * (r & 1)][2 * q + e + 8 * (r >> 1)] = half_float(parts[r] >> (16 * e));
            b[2 * q + e][n] = half_float(one.b0 >> (16 * e));
            b[2 * q + 8 + e][n] = half_float(one.b1 >> (16 * e));
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        Product& one = products[warp * 32 + lane];
        for (int r = 0; r < 4; r++) {
            float sum = one.c[r];
            for (int k = 0; k < 16; k++) sum += a[lane / 4 + 8 * (r >> 1)][k] * b[k][2 * (lane % 4) + (r & 1)];
            one.c[r] = sum;
        }
    }
}

struct Thread {
    struct X {
        operator int() const { return current; }
    } x;
};
inline Thread thread;

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block_index
#define gridDim emulated::grid_size

inline void __syncthreads() {
    emulated::meet(emulated::whole, static_cast<int>(emulated::fibers.size()), [] {});
}
inline void __syncwarp() { emulated::meet_warp(); }
inline float __expf(float x) { return std::exp(x); }
inline float quotient(float x, float y) { return x / y; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

template <class T>
T from_lane(T value, int lane) {
    return emulated::shuffled(value, [=](int) { return lane; });
}
template <class T>
T across(T value, int mask) {
    return emulated::shuffled(value, [=](int lane) { return lane ^ mask; });
}
template <class T>
T from_below(T value, int step) {
    return emulated::shuffled(value, [=](int lane) { return lane >= step ? lane - step : lane; });
}
inline uint32_t alike(uint32_t value) {
    uint32_t found = 0;
    for (int lane = 0; lane < 32; lane++) found |= uint32_t(from_lane(value, lane) == value) << lane;
    return found;
}
inline uint32_t pick(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t pool = uint64_t(b) << 32 | a;
    uint32_t found = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t one = selector >> (4 * i) & 15;
        if (one & 8) fprintf(stderr, "a selector replicates a sign\n"), abort();
        found |= uint32_t(pool >> (8 * one) & 255) << (8 * i);
    }
    return found;
}
inline uint32_t half2_of(float x, float y) { return emulated::float_half(x) | emulated::float_half(y) << 16; }
inline float2 floats_of(uint32_t halves) { return {emulated::half_float(halves), emulated::half_float(halves >> 16)}; }
template <class T>
T read(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) fprintf(stderr, "a misaligned read\n"), abort();
    T value;
    memcpy(&value, at, sizeof value);
    return value;
}
inline void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    emulated::products[emulated::current] = {c, a, b0, b1};
    const int warp = emulated::current / 32;
    emulated::meet(emulated::warps[warp], 32, [=] { emulated::multiply(warp); });
}
