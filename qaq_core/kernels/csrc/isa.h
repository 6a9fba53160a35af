// The instruction sets that kernels are compiled for, and the one in use.
#pragma once
#include "decode.h"
#include "dense_kernels.h"
#include "encode_kernels.h"
#include "prompt_kernels.h"

// Attends with the query heads of one KV head of a layer.
using AttendHead = void (*)(const QaqLayer& layer, int head);

// A decode step of one KV head of sequence i; `attend` is used for attention.
using DecodeHead = void (*)(const QaqDecode& step, QaqLayer layer, int i, int head, AttendHead attend);

struct InstructionSet {
    const char* name;
    bool (*runs)();  // on this processor, under this system
    AttendHead attend;
    DecodeHead decode;
    DenseKernels dense;
    EncodeKernels encode;
    PromptKernels prompt;
};

// The one in use: the best that runs here, unless qaq_use chose another.
const InstructionSet& instruction_set();

// attention_generic.cpp, decode_generic.cpp, dense_generic.cpp, encode_generic.cpp, prompt_generic.cpp
void attend_generic(const QaqLayer& layer, int head);
void decode_generic(const QaqDecode& step, QaqLayer layer, int i, int head, AttendHead attend);
extern const DenseKernels dense_generic;
extern const EncodeKernels encode_generic;
extern const PromptKernels prompt_generic;

// attention_avx2.cpp, ...; on x86-64 only
void attend_avx2(const QaqLayer& layer, int head);
void decode_avx2(const QaqDecode& step, QaqLayer layer, int i, int head, AttendHead attend);
extern const DenseKernels dense_avx2;
extern const EncodeKernels encode_avx2;
extern const PromptKernels prompt_avx2;

// attention_avx512.cpp, ...; on x86-64 only
void attend_avx512(const QaqLayer& layer, int head);
void decode_avx512(const QaqDecode& step, QaqLayer layer, int i, int head, AttendHead attend);
extern const DenseKernels dense_avx512;
extern const EncodeKernels encode_avx512;
extern const PromptKernels prompt_avx512;
