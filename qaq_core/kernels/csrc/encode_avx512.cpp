// The same operations for AVX-512; see attention_avx2.cpp for why headers come first.
#include "encode.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "isa.h"

#include "begin_avx512.inc"
#include "encode.inc"

const EncodeKernels encode_avx512{transform_rows, rms_rows, encode_rows};

#include "end_avx512.inc"

#endif
