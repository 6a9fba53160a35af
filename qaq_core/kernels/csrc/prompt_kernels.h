// What a prompt's attention needs of an instruction set.
#pragma once
#include "prompt.h"

// A KV head's tokens as floats, [tokens][dim], in the order of positions.
struct PromptRows {
    const float *keys, *values;
};

// Of what queries observed, tokens from `first` on: shares [tokens]. Either may be null.
struct PromptShares {
    float *sums, *peaks;
};

struct PromptKernels {
    int queries;  // that a call of `attend` takes at most

    // Writes tokens first..last-1 of a head's keys (side 0) or values (side 1) to `rows` [tokens][dim].
    void (*rows)(const QaqPrompt& prompt, const QaqLayer& layer, int head, int side, int first, int last, float* rows);

    // Attends with queries first..first+count-1 of a KV head, and writes what they observed of tokens begin..end-1.
    // Shares have room for eight tokens more. Returns begin; end is the position after the last query.
    int (*attend)(const QaqPrompt& prompt, const QaqLayer& layer, PromptRows rows, int head, int first, int count,
                  PromptShares shares);
};
