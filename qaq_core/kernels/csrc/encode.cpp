// The C interface of encode.h: cuts the work into tasks for threads.
#include "encode.h"

#include <algorithm>
#include <atomic>

#include "encode_kernels.h"
#include "isa.h"
#include "threads.h"

static const EncodeKernels& kernels() { return instruction_set().encode; }

// Calls part(begin, end) for parts of all vectors, on up to `threads` threads.
template <class Part>
static void in_parts(int32_t threads, const QaqSpan& span, Part part) {
    constexpr int64_t size = 512;
    const int64_t n = span.layers * span.heads * span.tokens;
    in_parallel(threads, int((n + size - 1) / size), [&](int i) { part(i * size, std::min(n, (i + 1) * size)); });
}

int32_t qaq_transform(const QaqTransform* transform, const QaqSpan* originals, int32_t type, int64_t start,
                      const QaqSpan* rows, int32_t threads) {
    const EncodeKernels& chosen = kernels();
    const int64_t size = type == QAQ_FLOAT ? 4 : 2, n = originals->tokens;
    const int32_t layers = int32_t(originals->layers);
    std::atomic<int32_t> bad{layers};
    in_parallel(threads, layers * transform->kv_heads, [&](int place) {
        const int32_t layer = place / transform->kv_heads;
        RowToMake chunk[ROW_CHUNK];
        for (int64_t first = 0; first < n; first += ROW_CHUNK) {
            const int count = int(std::min<int64_t>(ROW_CHUNK, n - first));
            for (int r = 0; r < count; ++r) {
                const int64_t i = place * n + first + r;
                chunk[r] = {static_cast<const uint8_t*>(originals->base) + offset_of(*originals, i) * size,
                            start + first + r, static_cast<float*>(rows->base) + offset_of(*rows, i)};
            }
            if (!chosen.transform(*transform, place, type, chunk, count))
                for (int32_t lowest = bad; layer < lowest && !bad.compare_exchange_weak(lowest, layer);) continue;
        }
    });
    return bad;
}

void qaq_transform_at(const QaqTransform* transform, int64_t n, const float* originals, const int64_t* place,
                      const int64_t* position, const int64_t* order, float* out) {
    const EncodeKernels& chosen = kernels();
    const int64_t dim = transform->dim;
    RowToMake chunk[ROW_CHUNK];
    for (int64_t first = 0; first < n;) {
        const int64_t mine = place[order[first]];
        int count = 0;
        for (; count < ROW_CHUNK && first < n && place[order[first]] == mine; ++first) {
            const int64_t row = order[first];
            const auto* original = reinterpret_cast<const uint8_t*>(originals + row * dim);
            chunk[count++] = {original, position[row], out + row * dim};
        }
        chosen.transform(*transform, mine, QAQ_FLOAT, chunk, count);
    }
}

void qaq_rms(const QaqSpan* rows, int32_t dim, int32_t split, float* out, int32_t threads) {
    const EncodeKernels& chosen = kernels();
    in_parts(threads, *rows, [&](int64_t begin, int64_t end) { chosen.rms(*rows, begin, end, dim, split, out); });
}

void qaq_encode(const QaqEncode* job, int32_t threads) {
    const EncodeKernels& chosen = kernels();
    in_parts(threads, job->rows, [&](int64_t begin, int64_t end) { chosen.encode(*job, begin, end); });
}
