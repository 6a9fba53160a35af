// Rows of a decoder layer with AVX2 and FMA.
#if defined(__x86_64__)

#define QAQ_AVX2
#include "dense_rows.h"
#include "isa.h"

const DenseKernels dense_avx2{norm, multiply, rotate, gate};

#endif
