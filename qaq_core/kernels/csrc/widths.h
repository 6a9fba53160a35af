// The widths that a tag's nibble is an index into.
#pragma once
#include "attention.h"

constexpr uint8_t HALF_BITS[QAQ_WIDTHS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 32};
