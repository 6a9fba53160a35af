// Generic code, and the choice of instruction set at run time.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "attention.inc"

#if defined(__x86_64__)
int qaq_attend_avx2(const QaqLayer& layer);  // attention_avx2.cpp
static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#else
static int qaq_attend_avx2(const QaqLayer& layer) { return attend(layer); }
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

int qaq_attend(const QaqLayer* layer) { return use_avx2 ? qaq_attend_avx2(*layer) : attend(*layer); }
