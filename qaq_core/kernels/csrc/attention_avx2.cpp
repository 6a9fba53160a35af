// Attention with AVX2, FMA and F16C.
#if defined(__x86_64__)

#define QAQ_AVX2
#include "attention_head.h"
#include "isa.h"
#include "target.h"

QAQ_BEGIN_TARGET

void attend_avx2(const QaqLayer& layer, int head) { attend(layer, head); }

QAQ_END_TARGET

#endif
