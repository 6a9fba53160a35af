// What a packed row can be.
#pragma once
#include "interface.h"

constexpr int HALF_BITS[QAQ_WIDTHS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 32};  // by a tag's nibble
constexpr int HALF = QAQ_WIDTHS - 1;  // the nibble of rows in half precision
constexpr int MAX_DIM = 256;          // torch does larger head_dims
