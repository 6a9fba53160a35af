// Encoding with AVX2, FMA and F16C.
#if defined(__x86_64__)

#define QAQ_AVX2
#include "encode_rows.h"
#include "isa.h"
#include "transform_rows.h"

const EncodeKernels encode_avx2{transform_rows, rms_rows, encode_rows};

#endif
