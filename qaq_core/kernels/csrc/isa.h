// What each instruction set gives: the work of one KV head, and of rows that are made.
#pragma once
#include "decode.h"
#include "encode_kernels.h"

using HeadAttention = void (*)(const QaqLayer& layer, int head);
using HeadDecode = void (*)(const QaqDecode& step, QaqLayer layer, int i, int head, HeadAttention attend);

struct InstructionSet {
    const char* name;
    bool (*runs)();  // on this processor, under this system
    HeadAttention attend;
    HeadDecode decode;
    EncodeKernels encode;
};

// The one in use: the best that runs here, until qaq_use says otherwise.
const InstructionSet& instruction_set();

// attention.cpp, decode.cpp, encode.cpp
void attend_generic(const QaqLayer& layer, int head);
void decode_generic(const QaqDecode& step, QaqLayer layer, int i, int head, HeadAttention attend);
extern const EncodeKernels encode_generic;

// attention_avx2.cpp and so on; there on x86-64 only
void attend_avx2(const QaqLayer& layer, int head);
void decode_avx2(const QaqDecode& step, QaqLayer layer, int i, int head, HeadAttention attend);
extern const EncodeKernels encode_avx2;

// attention_avx512.cpp and so on
void attend_avx512(const QaqLayer& layer, int head);
void decode_avx512(const QaqDecode& step, QaqLayer layer, int i, int head, HeadAttention attend);
extern const EncodeKernels encode_avx512;
