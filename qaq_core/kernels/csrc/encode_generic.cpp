// Encoding for any processor.
#include "encode_rows.h"
#include "isa.h"
#include "transform_rows.h"

const EncodeKernels encode_generic{transform_rows, rms_rows, encode_rows};
