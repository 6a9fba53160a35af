// Queries as integers for products with levels, with AVX2.
#pragma once
#define QAQ_AVX2

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "code_levels_avx2.h"
#include "target.h"

QAQ_BEGIN_TARGET
namespace {

// Query heads as integers, in the order of slots.
struct QueryCodes {
    int heads, dim;
    std::vector<int16_t> codes;  // [4][heads][dim], by the logarithm of field_bits
    std::vector<float> units;    // [heads], the score of integer 1 times level 1

    void quantize(const float* queries, int64_t step, int count, int width, float level_unit) {
        heads = count, dim = width;
        if (codes.size() < size_t(4 * heads * dim)) codes.resize(4 * heads * dim);
        if (units.size() < size_t(heads)) units.resize(heads);
        for (int g = 0; g < heads; ++g, queries += step) {
            float most = 0, sum = 0,
                  largest = 0;  // of the sizes of dims: the largest, their sum, the largest sum of a chunk
            for (int d = 0; d < dim; d += 8 * CHUNK) {
                float some = 0;
                for (int i = d; i < std::min(d + 8 * CHUNK, dim); ++i)
                    most = std::max(most, std::abs(queries[i])), some += std::abs(queries[i]);
                largest = std::max(largest, some), sum += some;
            }
            // The sum passes NaN and infinity on.
            const float unit = std::max(most / MOST, largest * (KEY_LEVELS / SUM_MOST));
            units[g] = (sum - sum + unit) * level_unit;
            const f8 share = splat(unit > 0 ? 1.0f / unit : 0.0f);
            for (int d = 0; d < dim; d += 8) {
                alignas(32) int32_t eight[8];
                _mm256_store_si256(reinterpret_cast<__m256i*>(eight),
                                   _mm256_cvtps_epi32((__m256)(load(queries + d) * share)));
                for (int kind = 0; kind < 4; ++kind)
                    for (int slot = 0; slot < 8; ++slot)
                        codes[(kind * heads + g) * dim + d + slot] = int16_t(eight[dim_at(1 << kind, slot)]);
            }
        }
    }
    // The integers of one octet, as four pairs.
    const int16_t* octet(int planes, int g, int o) const {
        return codes.data() + (__builtin_ctz(field_bits(planes)) * heads + g) * dim + 8 * o;
    }
};

}  // namespace
QAQ_END_TARGET
