// Rows of a decoder layer for any processor.
#include "dense_rows.h"
#include "isa.h"

const DenseKernels dense_generic{norm, multiply, rotate, gate};
