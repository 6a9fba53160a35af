// The same kernels on a CPU, for tests: blocks of 128 tokens, so that small examples have several.
#define QAQ_EMULATE
#include "encode.h"
#include "merge.h"
#include "observe.h"
#include "prepare.h"
#include "rotate.h"
#include "split.h"
#include "weave.h"

namespace {

template <class Kernel, class Args>
void run(const Args& args, dim3 grid, int threads) {
    static Kernel shared;
    emulated::grid_size = grid;
    for (int z = 0; z < grid.z; z++)
        for (int y = 0; y < grid.y; y++)
            for (int x = 0; x < grid.x; x++) {
                emulated::block_index = {x, y, z};
                memset(static_cast<void*>(&shared), 0xA5, sizeof shared);  // shared memory begins as anything
                emulated::run_block(threads, [&] { shared.run(args); });
            }
}

struct Observe {
    void run(const ObserveArgs& args) { observe(args); }
};

template <int DIM>
int run_of(const char* name, const void* args, dim3 grid, int threads, int block) {
    if (!strcmp(name, "prepare")) {
        run<Prepare<DIM>>(*static_cast<const PrepareArgs*>(args), grid, threads);
    } else if (!strcmp(name, "split") && block == 128) {
        run<Split<DIM, 128, 2>>(*static_cast<const SplitArgs*>(args), grid, threads);
    } else if (!strcmp(name, "split") && block == 1024 && DIM == 64) {  // as on a GPU
        run<Split<64, 1024, 4>>(*static_cast<const SplitArgs*>(args), grid, threads);
    } else if (!strcmp(name, "rotate")) {
        run<Rotate<DIM>>(*static_cast<const RotateArgs*>(args), grid, threads);
    } else if (!strcmp(name, "encode")) {
        run<EncodeRows<DIM>>(*static_cast<const EncodeArgs*>(args), grid, threads);
    } else if (!strcmp(name, "merge")) {
        run<Merge<DIM>>(*static_cast<const MergeArgs*>(args), grid, threads);
    } else {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" int qaq_emulate(const char* name, int dim, const void* args, int x, int y, int z, int threads, int block) {
    const dim3 grid = {x, y, z};
    if (!strcmp(name, "observe")) return run<Observe>(*static_cast<const ObserveArgs*>(args), grid, threads), 0;
    if (!strcmp(name, "weave")) {
        const auto& given = *static_cast<const WeaveArgs*>(args);
        return block == 128 ? run<Weave<128>>(given, grid, threads) : run<Weave<1024>>(given, grid, threads), 0;
    }
    if (dim == 64) return run_of<64>(name, args, grid, threads, block);
    if (dim == 96) return run_of<96>(name, args, grid, threads, block);
    if (dim == 128) return run_of<128>(name, args, grid, threads, block);
    if (dim == 256) return run_of<256>(name, args, grid, threads, block);
    return 1;
}

extern "C" int qaq_sizes(int which) {
    const int sizes[] = {sizeof(Sequence),  sizeof(Step),       sizeof(PrepareArgs),
                         sizeof(SplitArgs), sizeof(MergeArgs),  sizeof(ObserveArgs),
                         sizeof(WeaveArgs), sizeof(RotateArgs), sizeof(EncodeArgs)};
    return sizes[which];
}
