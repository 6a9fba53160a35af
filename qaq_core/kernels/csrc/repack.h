// Weaving a pool: the rows of one side of one block of tokens, put in order again when some come or change their width.
// qaq_core/storage/repack.py says what is computed. Tags are one byte per token; `shift` selects the side's nibble, which is an
// index into the widths.
#pragma once
#include <cstdint>

extern "C" {

struct QaqRepack {
    int32_t runs;           // layers * kv_heads
    int32_t before, after;  // tokens of each run
    int32_t half_bit;       // bytes that half a bit an element takes
    int32_t shift;          // 0 for keys, 4 for values
    const uint8_t* tags_before;
    int64_t before_stride;  // bytes from run to run
    const uint8_t* tags_after;
    int64_t after_stride;
    const uint8_t* const* held;  // [QAQ_WIDTHS] rows held, by (run, token)
    uint8_t* const* rows;        // [QAQ_WIDTHS] where they go; null for widths that nothing comes to or leaves
    int64_t moves;
    const int64_t* index;    // [moves], ascending, flat in [runs][after]
    const uint8_t* keep;     // [moves], the width up to which the row held before stays
    const uint8_t* planes;   // the other bytes of each row that has some
    const int64_t* offsets;  // [moves], where they begin
};

// Counts how many of the `n` tags of each of `runs` runs name each width: counts [runs][QAQ_WIDTHS].
void qaq_count(const uint8_t* tags, int64_t stride, int32_t runs, int32_t n, int32_t shift, int64_t* counts);

void qaq_repack(const QaqRepack* repack);

struct QaqNarrow {
    int32_t runs, tokens;
    int32_t half_bit, shift;  // as above
    const uint8_t* before;
    int64_t before_stride;
    const uint8_t* after;
    int64_t after_stride;
    const uint8_t* const* held;  // [QAQ_WIDTHS] rows held, by (run, token)
    uint8_t* const* rows;        // [QAQ_WIDTHS] where they go, all but those of width 0
};

// Cuts every row off at the width it has afterwards, which is at most what it had. No row may be in half precision.
void qaq_narrow(const QaqNarrow* narrow);
}
