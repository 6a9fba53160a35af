// The kernels that a GPU is given, for each head_dim: qaq_prepare_64, qaq_split_64, qaq_merge_64, …, and
// qaq_observe and qaq_weave.
#include "encode.h"
#include "merge.h"
#include "observe.h"
#include "prepare.h"
#include "rotate.h"
#include "split.h"
#include "weave.h"

constexpr int BLOCK = 1024, WARPS = 4;

#define QAQ_KERNELS(DIM)                                                                                               \
    extern "C" __global__ void __launch_bounds__(128, 8) qaq_prepare_##DIM(const __grid_constant__ PrepareArgs args) { \
        __shared__ Prepare<DIM> shared;                                                                                \
        shared.run(args);                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, (DIM) < 128 ? 3 : 4)                                      \
        qaq_split_##DIM(const __grid_constant__ SplitArgs args) {                                                      \
        __shared__ Split<DIM, BLOCK, WARPS> shared;                                                                    \
        shared.run(args);                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 4) qaq_merge_##DIM(const __grid_constant__ MergeArgs args) {     \
        __shared__ Merge<DIM> shared;                                                                                  \
        shared.run(args);                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, (DIM) < 256 ? 4 : 2)                                             \
        qaq_rotate_##DIM(const __grid_constant__ RotateArgs args) {                                                    \
        __shared__ Rotate<DIM> shared;                                                                                 \
        shared.run(args);                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) qaq_encode_##DIM(const __grid_constant__ EncodeArgs args) {      \
        __shared__ EncodeRows<DIM> shared;                                                                             \
        shared.run(args);                                                                                              \
    }

#ifdef QAQ_DIM
#define QAQ_KERNELS_OF(DIM) QAQ_KERNELS(DIM)
QAQ_KERNELS_OF(QAQ_DIM)
#else
QAQ_KERNELS(64)
QAQ_KERNELS(96)
QAQ_KERNELS(128)
QAQ_KERNELS(256)
#endif
extern "C" __global__ void __launch_bounds__(256) qaq_observe(const __grid_constant__ ObserveArgs args) {
    observe(args);
}
extern "C" __global__ void __launch_bounds__(128) qaq_weave(const __grid_constant__ WeaveArgs args) {
    __shared__ Weave<BLOCK> shared;
    shared.run(args);
}
