// A prompt's attention for any processor.
#include "isa.h"
#include "prompt_block.h"
#include "prompt_rows.h"

const PromptKernels prompt_generic{BLOCK_VECTORS * WIDE, prompt_rows, attend_block};
