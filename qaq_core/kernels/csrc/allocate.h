// The balanced policy (qaq_core/allocation/policies/balanced.py): weights of tokens, widths of their rows, and the rows
// that should change width. `heads` are the KV heads of all layers; their strides are in bytes. Thresholds are by meta
// byte: [heads][256][QAQ_STEPS], ascending; a row takes the steps whose threshold its weight times a factor exceeds.
#pragma once
#include <cstdint>

extern "C" {

enum { QAQ_STEPS = 12 };  // from each width of codes to the next

struct QaqWeigh {
    int32_t heads, tokens, first, count;  // weights are of `count` tokens from `first` on
    int32_t sinks, reach;
    float own, before;   // shares of a token's own attention, and of the mean of it and of `reach` tokens before it
    float share, floor;  // a weight is `share` times the relative attention, plus `floor`
    const uint8_t* state;
    int64_t state_stride;
    const float* importance;  // [256], of a byte of the state
    double* sums;             // scratch [tokens + 1]
    float* smooth;            // scratch [tokens]
    float* weight;            // out [heads][count]
};

struct QaqSideRows {
    int32_t heads, count;
    const float* weight;  // [heads][count]
    const uint8_t* meta;
    int64_t meta_stride;
    const float* thresholds;
    const uint8_t* tags;
    int64_t tags_stride;
    int32_t shift;  // 0 for keys, 4 for values
};

struct QaqStatisticUpdate {
    int32_t heads, tokens;
    uint8_t* state;
    int64_t state_stride;
    const float* importance;  // [256], of a byte of the state
    const float* observed;    // [heads][tokens], a step's attention
    float keep;               // weight of the state in the mean
    float log2_floor, step;   // code c stands for 2^(log2_floor + c * step), and 0 for 0
    int64_t seed;             // of the dither
};

// Updates the state of a decaying mean square with a step's attention (qaq_core/allocation/attention_statistics.py).
// Returns 0 or a QaqRefusal, as the functions below.
int32_t qaq_update_statistic(const QaqStatisticUpdate* job);

int32_t qaq_weigh(const QaqWeigh* job);

// Widths [heads][count] in half bits, for weights times `factor`.
int32_t qaq_widths(const QaqSideRows* rows, float factor, uint8_t* widths);

// Finds the rows that are wider than weights times `upper` ask for, or narrower than weights times `lower` do; NaN
// finds none. Writes their flat indices, ascending, their widths, and the widths for weights times `target`, all of
// which have room for all rows. Returns the number of rows found, or a
// QaqRefusal.
int64_t qaq_width_changes(const QaqSideRows* rows, float upper, float target, float lower, int64_t* index,
                          uint8_t* held, uint8_t* wanted);
}
