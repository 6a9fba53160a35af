// Buffers of numbers that are kept from call to call.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "target.h"

QAQ_BEGIN_TARGET
namespace {

// Numbers from a multiple of 64 bytes on, as no vector of less than a line should lie in two. A std::vector, even one of
// vectors, does not see to it. What it held is lost when it grows.
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
        held_.assign(size + 64 / sizeof(T), T());
        void* first = held_.data();
        size_t left = held_.size() * sizeof(T);
        first_ = static_cast<T*>(std::align(64, size * sizeof(T), first, left));
        size_ = size;
    }

  private:
    std::vector<T> held_;
    T* first_ = nullptr;
    size_t size_ = 0;
};

// Makes room in a buffer that is kept from call to call.
template <typename Buffer>
inline void room(Buffer& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
}

}  // namespace
QAQ_END_TARGET
