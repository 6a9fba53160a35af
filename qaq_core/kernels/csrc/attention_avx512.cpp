// Attention with AVX-512.
#if defined(__x86_64__)

#define QAQ_AVX512
#include "attention_head_avx512.h"
#include "isa.h"
#include "target.h"

QAQ_BEGIN_TARGET

void attend_avx512(const QaqLayer& layer, int head) { attend(layer, head); }

QAQ_END_TARGET

#endif
