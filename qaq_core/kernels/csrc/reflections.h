// Turning vectors to a sequence's own axes and back. All of a head's are turned together, reflection by reflection:
// each has to wait for the one before it, and so does something else meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "widths.h"
#include "rotation.h"
#include "target.h"
#include "vectors.h"

QAQ_BEGIN_TARGET
namespace {

inline int64_t numbers_of(int dim) { return int64_t(dim) * (dim + 1) / 2 - 1; }

// A reflection's vector from dim `first` on, after zeros from the octet's beginning on. Returns its square.
template <class T>
inline int spread_vector(const int8_t* numbers, int first, int dim, T* vector) {
    std::fill(vector + first / 8 * 8, vector + first, T(0));
    int square = 0;
    for (int d = first; d < dim; ++d) {
        const int number = numbers[d - first];
        vector[d] = T(number), square += number * number;
    }
    return square;
}

// Reflects n rows, one after the other, by the vector that leaves the first dims alone.
QAQ_NOINLINE void reflect(const int8_t* numbers, int first, int dim, float* rows, int n) {
    float vector[MAX_DIM];
    const int square = spread_vector(numbers, first, dim, vector);
    if (!square) return;
    for (int i = 0; i < n; ++i, rows += dim) {
        f8 sums = {};
        for (int d = first / 8 * 8; d < dim; d += 8) sums += load(rows + d) * load(vector + d);
        const f8 share = splat(total(sums) * 2 / square);
        for (int d = first / 8 * 8; d < dim; d += 8) store(rows + d, load(rows + d) - share * load(vector + d));
    }
}

void divide_octets(const float* by, int dim, float* rows, int n) {
    for (int i = 0; i < n; ++i, rows += dim)
        for (int d = 0; d < dim; d += 8) store(rows + d, load(rows + d) / by[d / 8]);
}

// Queries that meet a head's rows, as they meet turned ones.
void turn_queries(const QaqRotation& rotation, int head, int dim, float* queries, int n) {
    const int8_t* numbers = rotation.reflections + head * numbers_of(dim);
    divide_octets(rotation.before + head * (dim / 8), dim, queries, n);
    for (int first = 0; first < dim - 1; numbers += dim - first, ++first) reflect(numbers, first, dim, queries, n);
    divide_octets(rotation.after + head * (dim / 8), dim, queries, n);
}

// Sums of a head's turned rows, as they were.
void turn_sums_back(const QaqRotation& rotation, int head, int dim, float* sums, int n) {
    const int8_t* numbers = rotation.reflections + (head + 1) * numbers_of(dim);
    divide_octets(rotation.after + head * (dim / 8), dim, sums, n);
    for (int first = dim - 2; first >= 0; --first) reflect(numbers -= dim - first, first, dim, sums, n);
    divide_octets(rotation.before + head * (dim / 8), dim, sums, n);
}

}  // namespace
QAQ_END_TARGET
