// The same operation for AVX-512.
#include "isa.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <type_traits>
#include <memory>
#include <vector>

#include "begin_avx512.inc"
#include "attention512.inc"

void attend_avx512(const QaqLayer& layer, int head) { attend(layer, head); }

#include "end_avx512.inc"

#endif
