// A prompt's attention with AVX2, FMA and F16C.
#if defined(__x86_64__)

#define QAQ_AVX2
#include "isa.h"
#include "prompt_block.h"
#include "prompt_rows.h"

const PromptKernels prompt_avx2{BLOCK_VECTORS * WIDE, prompt_rows, attend_block};

#endif
