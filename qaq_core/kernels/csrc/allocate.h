// The balanced policy: what tokens weigh, how wide their rows should be, and which rows should change their width.
// qaq_core/allocation/policies/balanced.py says what is computed. A run is one KV head of one layer; strides are bytes from run to
// run. Thresholds are those of each meta byte: [runs][256][QAQ_STEPS].
#pragma once
#include <cstdint>

extern "C" {

enum { QAQ_STEPS = 12 };  // from one width that holds codes to the next

struct QaqWeigh {
    int32_t runs, tokens, first, count;  // of all tokens, so many from `first` on are weighed
    int32_t sinks, reach;
    float own, before;   // shares of a token's own attention, and of the mean of it and of `reach` tokens before it
    float share, floor;  // a weight is `share` times what attention says, and `floor`
    const uint8_t* state;
    int64_t state_stride;
    const float* importance;  // [256], of a byte of the state
    double* sums;             // scratch [tokens + 1]
    float* smooth;            // scratch [tokens]
    float* weight;            // out [runs][count]
};

struct QaqSideRows {
    int32_t runs, count;
    const float* weight;  // [runs][count]
    const uint8_t* meta;
    int64_t meta_stride;
    const float* thresholds;
    const uint8_t* tags;
    int64_t tags_stride;
    int32_t shift;  // 0 for keys, 4 for values
};

struct QaqStatisticUpdate {
    int32_t runs, tokens;
    uint8_t* state;
    int64_t state_stride;
    const float* importance;  // [256], of a byte of the state
    const float* observed;        // [runs][tokens], what a step looked at
    float keep;               // share of what was known
    float log2_floor, step;   // code c stands for 2^(log2_floor + c * step), and 0 for 0
    int64_t seed;             // of the thresholds that numbers are rounded at
};

// Folds what a step looked at into a decaying window's state, as window.py says.
void qaq_update_statistic(const QaqStatisticUpdate* job);

void qaq_weigh(const QaqWeigh* job);

// Widths [runs][count] in half bits, of tokens worth `worth` times their weight.
void qaq_widths(const QaqSideRows* rows, float worth, uint8_t* widths);

// Finds the rows that are wider than what `most` times their weight asks for, or narrower than what `least` times it
// does; a NaN looks for none. Writes their flat indices, ascending, the widths they have and those they want at `worth`
// times their weight. Returns how many. `index`, `held` and `wanted` have room for all rows.
int64_t qaq_width_changes(const QaqSideRows* rows, float most, float worth, float least, int64_t* index, uint8_t* held,
                   uint8_t* wanted);
}
