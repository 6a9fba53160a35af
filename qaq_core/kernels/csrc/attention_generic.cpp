// Attention for any processor.
#include "attention_head.h"
#include "isa.h"
#include "target.h"

QAQ_BEGIN_TARGET

void attend_generic(const QaqLayer& layer, int head) { attend(layer, head); }

QAQ_END_TARGET
