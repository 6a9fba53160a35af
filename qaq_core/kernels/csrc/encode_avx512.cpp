// Encoding with AVX-512.
#if defined(__x86_64__)

#define QAQ_AVX512
#include "encode_rows.h"
#include "isa.h"
#include "transform_rows.h"

const EncodeKernels encode_avx512{transform_rows, rms_rows, encode_rows};

#endif
