// Decode steps with AVX2, FMA and F16C.
#if defined(__x86_64__)

#define QAQ_AVX2
#include "decode_head.h"
#include "isa.h"
#include "target.h"

QAQ_BEGIN_TARGET

void decode_avx2(const QaqDecode& step, QaqLayer layer, int i, int head, AttendHead attend) {
    decode(step, layer, i, head, attend);
}

QAQ_END_TARGET

#endif
