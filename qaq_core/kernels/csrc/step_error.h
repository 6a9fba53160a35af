// What quantization costs one decode step in one layer (qaq_core/allocation/step_error.py): the error of a packed token
// is its squared probability times what its rows lost. Tables are by meta byte and width: [heads][256][QAQ_WIDTHS].
#pragma once
#include <cstdint>

extern "C" {

struct QaqStepError {
    int32_t heads, tokens;  // KV heads of the layer, packed tokens
    const float* observed;  // [heads][tokens], squared probabilities
    int64_t observed_stride;
    const float* factors;  // [heads], of an error in nats
    const uint8_t* tags;
    int64_t tags_stride;
    const uint8_t *key_meta, *value_meta;
    int64_t meta_stride;
    const float *key_lost, *value_lost;
    float negligible;  // tokens whose squared probability times the factor is at most this count as 0
    float least;       // tokens whose error is above this are written
    int64_t room;      // for so many of them
    int64_t* index;    // head * tokens + token
    float* error;
    double* total;  // of all tokens
};

// Returns the number of tokens above `least`, which may exceed `room`, or a QaqRefusal.
int64_t qaq_step_error(const QaqStepError* job);
}
