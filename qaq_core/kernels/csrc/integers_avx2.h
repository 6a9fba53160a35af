//
#pragma once
#define QAQ_AVX2

#include "target.h"

QAQ_BEGIN_TARGET
namespace {

constexpr int KEY_LEVELS = 32767;    // the largest level's integer: an error in a score is one of its weight's logarithm
constexpr int VALUE_LEVELS = 16383;  // leaves more bits to the weights
constexpr float MOST = 32767;        // for queries and weights
constexpr int CHUNK = 2;             // octets whose products are added as integers
constexpr float SUM_MOST = 2.1e9f;   // below 2^31, roundings included

}  // namespace
QAQ_END_TARGET
