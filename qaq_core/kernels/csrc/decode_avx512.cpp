// Decode steps with AVX-512.
#if defined(__x86_64__)

#define QAQ_AVX512
#include "decode_head.h"
#include "isa.h"
#include "target.h"

QAQ_BEGIN_TARGET

void decode_avx512(const QaqDecode& step, QaqLayer layer, int i, int head, AttendHead attend) {
    decode(step, layer, i, head, attend);
}

QAQ_END_TARGET

#endif
