// Repacking a pool: rows of one side of one block of tokens are put in order again after some were added or changed
// width. qaq_core/storage/repack.py defines the result. Tags are one byte per token; `shift` selects the side's nibble,
// an index into the widths. `heads` are the KV heads of all layers; their strides are in bytes.
#pragma once
#include "interface.h"

extern "C" {

struct QaqRepack {
    int32_t heads;
    int32_t before, after;  // tokens of each head
    int32_t half_bit;       // bytes of a row per half bit of width
    int32_t shift;          // 0 for keys, 4 for values
    const uint8_t* tags_before;
    int64_t before_stride;
    const uint8_t* tags_after;
    int64_t after_stride;
    const uint8_t* const* held;  // [QAQ_WIDTHS], the rows before, ordered by head and token
    const int64_t* held_rows;    // [QAQ_WIDTHS], how many they are
    uint8_t* const* rows;        // [QAQ_WIDTHS], the rows after; null for widths that gain and lose none
    const int64_t* room;         // [QAQ_WIDTHS], how many they are
    int64_t moves;
    const int64_t* index;   // [moves], ascending, flat in [heads][after]
    const uint8_t* keep;    // [moves], the width up to which the row before is kept
    const uint8_t* planes;  // the other bytes of the moved rows
    int64_t plane_bytes;
    const int64_t* offsets;  // [moves], where each row's begin
};

// Counts the tags of each width among the n tags of each head: counts [heads][QAQ_WIDTHS]. Returns 0 or a QaqRefusal,
// as the functions below; rows that were written before one are worth nothing.
int32_t qaq_count(const uint8_t* tags, int64_t stride, int32_t heads, int32_t n, int32_t shift, int64_t* counts);

int32_t qaq_repack(const QaqRepack* job);

struct QaqNarrow {
    int32_t heads, tokens;
    int32_t half_bit, shift;  // as above
    const uint8_t* before;
    int64_t before_stride;
    const uint8_t* after;
    int64_t after_stride;
    const uint8_t* const* held;  // [QAQ_WIDTHS], the rows before, ordered by head and token
    const int64_t* held_rows;    // [QAQ_WIDTHS], how many they are
    uint8_t* const* rows;        // [QAQ_WIDTHS], the rows after; null for width 0
    const int64_t* room;         // [QAQ_WIDTHS], how many they are
};

// Cuts every row off at its width in `after`, which must not exceed that in `before`. No row may be in half precision.
int32_t qaq_narrow(const QaqNarrow* job);
}
