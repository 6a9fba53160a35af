// Decode steps for any processor.
#include "decode_head.h"
#include "isa.h"
#include "target.h"

QAQ_BEGIN_TARGET

void decode_generic(const QaqDecode& step, QaqLayer layer, int i, int head, AttendHead attend) {
    decode(step, layer, i, head, attend);
}

QAQ_END_TARGET
