// Recycled memory for gradients. A fresh gradient of gigabytes costs more in page faults (the kernel zeroes every page)
// than the loss itself; a training loop asks for the same size again each step. Freed buffers are kept, marked so that
// the kernel may take their pages whenever it needs memory (MADV_FREE), and handed out again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastloss {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;       // usable
  bool recycled = false;  // its pages were there before
};

// At least `bytes` bytes, aligned to a huge page. Throws std::bad_alloc.
Buffer acquire_buffer(size_t bytes);
void release_buffer(const Buffer& buffer);

// Returns the idle buffers to the system; the number of bytes.
size_t empty_cache();

}  // namespace fastloss
