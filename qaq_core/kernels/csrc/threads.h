// A pool of threads for work in many tasks.
#pragma once
#include <functional>

// Runs task(0) … task(count - 1), in any order, on up to `threads` threads, and returns when all are done. The caller
// takes tasks too, so it never waits for a thread to wake up. While another call runs, the caller works alone.
void in_parallel(int threads, int count, const std::function<void(int)>& task);
