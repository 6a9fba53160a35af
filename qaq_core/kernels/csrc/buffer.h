// Scratch memory that is kept from call to call.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "target.h"

QAQ_BEGIN_TARGET
namespace {

// Numbers aligned to 64 bytes, so that no vector crosses a cache line. std::vector does not align them. Growing loses
// the contents.
template <typename T>
class Buffer {
  public:
    Buffer() = default;
    Buffer(Buffer&&) = default;
    Buffer& operator=(Buffer&&) = default;

    size_t size() const { return size_; }
    T* data() { return first_; }
    const T* data() const { return first_; }
    T& operator[](size_t i) { return first_[i]; }
    const T& operator[](size_t i) const { return first_[i]; }
    void resize(size_t size) {
        memory_.assign(size + 64 / sizeof(T), T());
        void* first = memory_.data();
        size_t left = memory_.size() * sizeof(T);
        first_ = static_cast<T*>(std::align(64, size * sizeof(T), first, left));
        size_ = size;
    }

  private:
    std::vector<T> memory_;
    T* first_ = nullptr;
    size_t size_ = 0;
};

// Resizes a buffer that is too small.
template <typename Buffer>
inline void grow(Buffer& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
}

}  // namespace
QAQ_END_TARGET
