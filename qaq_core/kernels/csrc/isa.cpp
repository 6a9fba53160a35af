// Chooses the instruction set at run time.
#include "isa.h"

#include <atomic>
#include <cstring>

// All instruction sets, the fastest first. Built on first use, because it copies constants of other files.
static const InstructionSet* best_first(int& count) {
    static const InstructionSet all[] = {
#if defined(__x86_64__)
        {"avx512",
         [] {
             return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("gfni") &&
                    __builtin_cpu_supports("fma");
         },
         attend_avx512, decode_avx512, dense_avx512, encode_avx512, prompt_avx512},
        {"avx2",
         [] {
             return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
         },
         attend_avx2, decode_avx2, dense_avx2, encode_avx2, prompt_avx2},
#endif
        {"generic", [] { return true; }, attend_generic, decode_generic, dense_generic, encode_generic, prompt_generic},
    };
    count = int(sizeof all / sizeof *all);
    return all;
}

// The best instruction set that runs here, or the named one; null if there is none.
static const InstructionSet* find(const char* name) {
    int count;
    const InstructionSet* all = best_first(count);
    for (int i = 0; i < count; ++i)
        if ((!name || std::strcmp(name, all[i].name) == 0) && all[i].runs()) return all + i;
    return nullptr;
}

static std::atomic<const InstructionSet*>& in_use() {
    static std::atomic<const InstructionSet*> chosen{find(nullptr)};
    return chosen;
}

const InstructionSet& instruction_set() { return *in_use(); }

const char* qaq_isa(void) { return instruction_set().name; }

int qaq_use(const char* isa) {
    const InstructionSet* wanted = find(isa);
    if (wanted) in_use() = wanted;
    return wanted ? 0 : -1;
}
