#include "buffers.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace fastloss {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kMaxIdle = 4;  // buffers

// Never destroyed: tensors may outlive static destructors.
std::mutex& mutex() {
  static auto* m = new std::mutex;
  return *m;
}
std::vector<Buffer>& idle() {
  static auto* list = new std::vector<Buffer>;
  return *list;
}

void unmap(const Buffer& b) { munmap(b.data, b.bytes); }

Buffer map(size_t bytes) {
  // One huge page more, and the two ends given back: the mapping starts and ends on a huge page.
  const size_t reserved = bytes + kHugePage;
  void* raw = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(raw);
  char* data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + kHugePage - 1) / kHugePage * kHugePage);
  if (data > begin) munmap(begin, size_t(data - begin));
  if (const size_t tail = size_t(begin + reserved - (data + bytes))) munmap(data + bytes, tail);
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return {data, bytes, false};
}

}  // namespace

Buffer acquire_buffer(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  {
    const std::lock_guard<std::mutex> lock(mutex());
    auto best = idle().end();
    for (auto b = idle().begin(); b != idle().end(); ++b)
      if (b->bytes >= bytes && b->bytes / 2 <= bytes && (best == idle().end() || b->bytes < best->bytes)) best = b;
    if (best != idle().end()) {
      const Buffer found{best->data, best->bytes, true};
      idle().erase(best);
      return found;
    }
  }
  return map(bytes);
}

void release_buffer(const Buffer& buffer) {
#if defined(MADV_FREE)
  madvise(buffer.data, buffer.bytes, MADV_FREE);
#endif
  const std::lock_guard<std::mutex> lock(mutex());
  idle().push_back(buffer);
  if (idle().size() <= kMaxIdle) return;
  unmap(idle().front());  // the one longest unused
  idle().erase(idle().begin());
}

size_t empty_cache() {
  std::vector<Buffer> all;
  {
    const std::lock_guard<std::mutex> lock(mutex());
    all.swap(idle());
  }
  size_t bytes = 0;
  for (const Buffer& b : all) {
    bytes += b.bytes;
    unmap(b);
  }
  return bytes;
}

}  // namespace fastloss
