// Encoding with AVX-512.
#if defined(__x86_64__)

#define QAQ_AVX512
#include "encode_rows.h"
#include "isa.h"
#include "target.h"
#include "transform_rows.h"

QAQ_BEGIN_TARGET

const EncodeKernels encode_avx512{transform_rows, rms_rows, encode_rows};

QAQ_END_TARGET

#endif
