// The C interface of encode.h: cuts the work into tasks for threads.
#include "encode.h"

#include <algorithm>
#include <atomic>

#include "checks.h"
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

static int64_t positions_of(const QaqTransform& transform) { return transform.angles_stride / transform.dim; }

int32_t qaq_transform(const QaqTransform* transform, const QaqSpan* originals, int32_t type, int64_t start,
                      const QaqSpan* rows, int32_t threads) {
    if (any_null({transform, originals, rows})) return QAQ_NULL;
    for (const int32_t refusal : {refusal_of(*transform), refusal_of(*originals), refusal_of(*rows)})
        if (refusal) return refusal;
    if (!is_type(type)) return QAQ_RANGE;
    if (originals->layers > transform->layers || originals->heads != transform->kv_heads ||
        rows->layers != originals->layers || rows->heads != originals->heads || rows->tokens != originals->tokens)
        return QAQ_SIZE;
    if (start < 0 || (transform->angles && start + originals->tokens > positions_of(*transform))) return QAQ_RANGE;
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

int32_t qaq_transform_at(const QaqTransform* transform, int64_t n, const float* originals, const int64_t* place,
                         const int64_t* position, const int64_t* order, float* out) {
    if (!is_count(n)) return QAQ_SIZE;
    if (!transform || (n && any_null({originals, place, position, order, out}))) return QAQ_NULL;
    if (const int32_t refusal = refusal_of(*transform)) return refusal;
    const int64_t places = int64_t(transform->layers) * transform->kv_heads;
    const int64_t positions = transform->angles ? positions_of(*transform) : INT64_MAX;
    for (int64_t r = 0; r < n; ++r)
        if (place[r] < 0 || place[r] >= places || position[r] < 0 || position[r] >= positions || order[r] < 0 ||
            order[r] >= n)
            return QAQ_RANGE;
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
    return 0;
}

// Numbers by row, of the dims before a split and from it on.
static int64_t numbers_of(const QaqSpan& rows, int32_t dim, int32_t split) {
    return rows.layers * rows.heads * rows.tokens * (split < dim ? 2 : 1);
}

int32_t qaq_rms(const QaqSpan* rows, int32_t dim, int32_t split, float* out, int64_t count, int32_t threads) {
    if (!rows) return QAQ_NULL;
    if (const int32_t refusal = refusal_of(*rows)) return refusal;
    if (rows->base && !out) return QAQ_NULL;
    if (!(dim > 0 && dim % 8 == 0) || !(split > 0 && split % 8 == 0) || split > dim) return QAQ_SIZE;
    if (count != numbers_of(*rows, dim, split)) return QAQ_SIZE;
    const EncodeKernels& chosen = kernels();
    in_parts(threads, *rows, [&](int64_t begin, int64_t end) { chosen.rms(*rows, begin, end, dim, split, out); });
    return 0;
}

static int32_t refusal_of(const QaqEncode& job) {
    const QaqCells& cells = job.cells;
    if (const int32_t refusal = refusal_of(job.rows)) return refusal;
    const int64_t n = job.rows.layers * job.rows.heads * job.rows.tokens;
    if (any_null({cells.edges, cells.below, cells.units})) return QAQ_NULL;
    if (n && any_null({job.scales, job.have, job.want, job.begin})) return QAQ_NULL;
    if (job.out_bytes && !job.out) return QAQ_NULL;
    if (!is_dim(cells.dim) || cells.split < 8 || cells.split % 8 || cells.split > cells.dim || cells.bins < 1)
        return QAQ_SIZE;
    if (job.scale_count != numbers_of(job.rows, cells.dim, cells.split)) return QAQ_SIZE;
    if (cells.below[0] < 0 || cells.below[cells.bins - 1] > 255) return QAQ_RANGE;
    for (int u = 0; u < cells.dim; ++u)
        if (cells.units[u] < 0 || cells.units[u] >= cells.dim) return QAQ_RANGE;
    for (int64_t i = 0; i < n; ++i) {
        const bool half = job.want[i] == HALF_BITS[HALF];
        if (!half && (job.want[i] > 16 || job.have[i] > job.want[i])) return QAQ_RANGE;
        const int64_t size = half ? 2 * cells.dim : job.want[i] * cells.dim / 16 - job.have[i] * cells.dim / 16;
        if (job.begin[i] < 0 || job.begin[i] > job.out_bytes - size) return QAQ_SIZE;
    }
    return 0;
}

int32_t qaq_encode(const QaqEncode* job, int32_t threads) {
    if (!job) return QAQ_NULL;
    if (const int32_t refusal = refusal_of(*job)) return refusal;
    const EncodeKernels& chosen = kernels();
    in_parts(threads, job->rows, [&](int64_t begin, int64_t end) { chosen.encode(*job, begin, end); });
    return 0;
}
