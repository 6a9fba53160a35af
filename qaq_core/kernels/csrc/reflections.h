// A sequence's rotation (rotation.h) applied to queries, and undone for sums of values. All vectors of a head pass
// through one reflection before the next: reflections of one vector depend on each other, those of different vectors do
// not.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rotation.h"
#include "target.h"
#include "vectors.h"
#include "widths.h"

QAQ_BEGIN_TARGET
namespace {

// Entries of all of a head's reflection vectors.
inline int64_t entries_of(int dim) { return int64_t(dim) * (dim + 1) / 2 - 1; }

// Writes a reflection's vector, which is 0 before dim `first`, from the beginning of that dim's octet. Returns its
// square.
template <class T>
inline int expand_vector(const int8_t* numbers, int first, int dim, T* vector) {
    std::fill(vector + first / 8 * 8, vector + first, T(0));
    int square = 0;
    for (int d = first; d < dim; ++d) {
        const int number = numbers[d - first];
        vector[d] = T(number), square += number * number;
    }
    return square;
}

// Reflects n rows by the vector that is 0 before dim `first`.
QAQ_NOINLINE void reflect(const int8_t* numbers, int first, int dim, float* rows, int n) {
    float vector[MAX_DIM];
    const int square = expand_vector(numbers, first, dim, vector);
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

// Rotates queries so that their products with a head's rotated keys are those with the keys.
void rotate_queries(const QaqRotation& rotation, int head, int dim, float* queries, int n) {
    const int8_t* numbers = rotation.reflections + head * entries_of(dim);
    divide_octets(rotation.before + head * (dim / 8), dim, queries, n);
    for (int first = 0; first < dim - 1; numbers += dim - first, ++first) reflect(numbers, first, dim, queries, n);
    divide_octets(rotation.after + head * (dim / 8), dim, queries, n);
}

// Rotates sums of a head's rotated values back.
void unrotate_sums(const QaqRotation& rotation, int head, int dim, float* sums, int n) {
    const int8_t* numbers = rotation.reflections + (head + 1) * entries_of(dim);
    divide_octets(rotation.after + head * (dim / 8), dim, sums, n);
    for (int first = dim - 2; first >= 0; --first) reflect(numbers -= dim - first, first, dim, sums, n);
    divide_octets(rotation.before + head * (dim / 8), dim, sums, n);
}

}  // namespace
QAQ_END_TARGET
