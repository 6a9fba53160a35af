// Encoding for any processor.
#include "encode_rows.h"
#include "isa.h"
#include "target.h"
#include "transform_rows.h"

QAQ_BEGIN_TARGET

const EncodeKernels encode_generic{transform_rows, rms_rows, encode_rows};

QAQ_END_TARGET
