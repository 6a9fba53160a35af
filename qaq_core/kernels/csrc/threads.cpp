#include "threads.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

class Pool {
  public:
    void run(int threads, int count, const std::function<void(int)>& task) {
        std::unique_lock<std::mutex> only(calls_, std::try_to_lock);
        if (threads <= 1 || count <= 1 || !only.owns_lock()) {
            for (int i = 0; i < count; ++i) task(i);
            return;
        }
        std::unique_lock<std::mutex> lock(state_);
        try {
            for (; started_ < threads - 1; ++started_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {  // no more threads available: the existing ones do the work
        }
        task_ = &task, next_ = 0, count_ = count, seats_ = threads - 1;
        lock.unlock();
        wake_.notify_all();
        lock.lock();
        take(lock);
        done_.wait(lock, [&] { return busy_ == 0; });
        task_ = nullptr;
    }

  private:
    // Runs tasks until none is left.
    void take(std::unique_lock<std::mutex>& lock) {
        while (next_ < count_) {
            const int mine = next_++;
            lock.unlock();
            (*task_)(mine);
            lock.lock();
        }
    }

    void work() {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [&] { return task_ && next_ < count_ && seats_ > 0; });
            --seats_, ++busy_;
            take(lock);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex calls_, state_;
    std::condition_variable wake_, done_;
    const std::function<void(int)>* task_ = nullptr;
    int next_ = 0, count_ = 0, seats_ = 0, busy_ = 0, started_ = 0;
};

}  // namespace

void in_parallel(int threads, int count, const std::function<void(int)>& task) {
    static Pool* pool = new Pool;  // never destroyed: its threads may outlive main
    pool->run(threads, count, task);
}
