// Rows of a decoder layer with AVX-512.
#if defined(__x86_64__)

#define QAQ_AVX512
#include "dense_rows.h"
#include "isa.h"

const DenseKernels dense_avx512{norm, multiply, rotate, gate};

#endif
