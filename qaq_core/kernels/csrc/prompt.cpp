// The C interface of prompt.h: tokens that are no floats yet become floats, one KV head or several at a time; then a
// task for each block of queries.
#include "prompt.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "threads.h"

namespace {

constexpr int64_t TOKENS = 1024;          // that a task makes floats of, from a multiple on
constexpr int64_t MOST_FLOATS = 1 << 23;  // of keys and values of the heads that are done together, if it is several

// Why a prompt cannot be attended to, or 0.
int32_t refusal_of(const QaqPrompt& prompt, const QaqLayer& layer) {
    if (const int32_t refusal = refusal_of(layer)) return refusal;
    if (any_null({prompt.query, prompt.out}) || !prompt.query_map != !prompt.output_map) return QAQ_NULL;
    if (!is_type(prompt.type)) return QAQ_RANGE;
    for (int32_t count : {prompt.queries, prompt.window, prompt.distance, prompt.summed})
        if (!is_count(count)) return QAQ_SIZE;
    const int64_t tokens = int64_t(layer.sinks) + layer.packed + layer.recent;
    if (prompt.queries > tokens || prompt.head_stride < 0 || prompt.query_stride < 0) return QAQ_SIZE;
    if ((prompt.sums || prompt.peaks) && prompt.observed_stride < tokens) return QAQ_SIZE;
    return 0;
}

// The prompt's attention in a layer.
struct Prompt {
    const QaqPrompt& prompt;
    const QaqLayer& layer;
    const PromptKernels& kernels;
    int32_t threads;

    int tokens() const { return layer.sinks + layer.packed + layer.recent; }
    int blocks() const { return (prompt.queries + kernels.queries - 1) / kernels.queries; }
    int64_t numbers() const { return int64_t(tokens()) * layer.dim; }  // of a head's keys
    bool in_place() const { return !layer.packed && layer.residual_type == QAQ_FLOAT; }

    // Runs tasks; returns whether one had no memory.
    template <typename Task>
    bool run(int count, Task task) const {
        std::atomic<bool> failed{false};
        in_parallel(threads, count, [&](int i) {
            try {
                task(i);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        });
        return failed;
    }

    // A head's tokens, which lie in `floats` if not in place.
    PromptRows rows(int head, const float* floats) const {
        if (!in_place()) return {floats, floats + numbers()};
        const auto at = [&](const QaqSide& side) {
            return static_cast<const float*>(side.residual) + head * side.residual_head_stride;
        };
        return {at(layer.key), at(layer.value)};
    }

    // Heads first..last-1. floats: [heads][2][tokens][dim].
    bool attend(int first, int last, float* floats) const {
        const int chunks = int((tokens() + TOKENS - 1) / TOKENS), heads = last - first;
        const auto make = [&](int task) {
            const int chunk = task % chunks, side = task / chunks % 2, head = task / chunks / 2;
            const int begin = int(chunk * TOKENS), end = std::min(tokens(), int((chunk + 1) * TOKENS));
            float* to = floats + (2 * head + side) * numbers() + int64_t(begin) * layer.dim;
            kernels.rows(prompt, layer, first + head, side, begin, end, to);
        };
        if (!in_place() && run(2 * heads * chunks, make)) return true;

        // What the last queries saw is summed block by block, in order, so that sums are the same with any threads.
        const int from = std::max(0, prompt.queries - prompt.summed) / kernels.queries, summed = blocks() - from;
        const int64_t room = tokens() + 8;
        std::vector<float> sums(prompt.sums ? size_t(heads) * summed * room : 0);
        std::mutex raising;
        const bool failed = run(heads * blocks(), [&](int task) {
            const int block = blocks() - 1 - task / heads, head = task % heads;  // the longest first
            const int begin = block * kernels.queries, count = std::min(kernels.queries, prompt.queries - begin);
            static thread_local std::vector<float> peaks;
            PromptShares shares{};
            if (prompt.peaks) peaks.resize(std::max(peaks.size(), size_t(room))), shares.peaks = peaks.data();
            if (prompt.sums && block >= from)
                shares.sums = sums.data() + (int64_t(head) * summed + block - from) * room;
            const PromptRows own = rows(first + head, floats + (in_place() ? 0 : 2 * head * numbers()));
            const int seen = kernels.attend(prompt, layer, own, first + head, begin, count, shares);
            if (!prompt.peaks) return;
            float* out = prompt.peaks + (first + head) * prompt.observed_stride;
            const int end = tokens() - prompt.queries + begin + count - prompt.distance;  // nearer ones have no peak
            const std::lock_guard<std::mutex> alone(raising);
            for (int t = seen; t < end; ++t)
                if (peaks[t] > out[t] || peaks[t] != peaks[t]) out[t] = peaks[t];
        });
        if (!prompt.sums) return failed;
        for (int head = 0; head < heads; ++head)
            for (int block = 0; block < summed; ++block) {
                const float* own = sums.data() + (int64_t(head) * summed + block) * room;
                float* out = prompt.sums + (first + head) * prompt.observed_stride;
                for (int t = 0; t < tokens(); ++t) out[t] += own[t];
            }
        return failed;
    }
};

}  // namespace

int qaq_prompt(const QaqPrompt* prompt, const QaqLayer* layer, int32_t threads) {
    if (any_null({prompt, layer})) return QAQ_NULL;
    if (const int32_t refusal = refusal_of(*prompt, *layer)) return refusal;
    if (!prompt->queries) return 0;
    const Prompt one{*prompt, *layer, instruction_set().prompt, threads};
    const int64_t each = one.in_place() ? 0 : 2 * one.numbers();
    const int together =
        each ? int(std::max<int64_t>(1, std::min<int64_t>(layer->kv_heads, MOST_FLOATS / each))) : layer->kv_heads;
    try {
        const std::unique_ptr<float[]> floats(new float[size_t(together) * each]);  // written before they are read
        for (int head = 0; head < layer->kv_heads; head += together)
            if (one.attend(head, std::min(layer->kv_heads, head + together), floats.get())) return QAQ_NO_MEMORY;
    } catch (const std::bad_alloc&) {
        return QAQ_NO_MEMORY;
    }
    return 0;
}
