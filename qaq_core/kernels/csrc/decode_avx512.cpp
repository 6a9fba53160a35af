// The same work for AVX-512.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "isa.h"

#if defined(__x86_64__)

#include "begin_avx512.inc"
#include "decode.inc"

void decode_avx512(const QaqDecode& step, QaqLayer layer, int i, int head, HeadAttention attend) {
    decode(step, layer, i, head, attend);
}

#include "end_avx512.inc"

#endif
