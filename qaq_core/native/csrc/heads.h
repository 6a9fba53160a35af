// What the instruction sets' own files give the others: the work of one KV head.
#pragma once
#include "decode.h"

using HeadAttention = void (*)(const QaqLayer& layer, int head);

struct Chosen {
    HeadAttention attend;
    bool is_avx2;
};

// Attention as the instruction set in use does it.
Chosen head_attention();

// decode_avx2.cpp; never called without `Chosen::is_avx2`.
void qaq_decode_avx2(const QaqDecode& step, QaqLayer layer, int i, int head, HeadAttention attend);
