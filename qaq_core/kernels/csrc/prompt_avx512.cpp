// A prompt's attention with AVX-512.
#if defined(__x86_64__)

#define QAQ_AVX512
#include "isa.h"
#include "prompt_block.h"
#include "prompt_rows.h"

const PromptKernels prompt_avx512{BLOCK_VECTORS * WIDE, prompt_rows, attend_block};

#endif
