// A small pool of threads for work that is cut into many tasks.
#pragma once
#include <functional>

// Runs task(0) … task(count - 1), in any order, on up to `threads` threads, and returns when all are done. The caller
// is one of them and does whatever no other thread takes, so it never waits for a thread to wake up. While another
// call is under way the caller works alone.
void in_parallel(int threads, int count, const std::function<void(int)>& task);
