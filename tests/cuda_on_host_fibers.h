// The stacks that CUDA threads run on, and how to get from one to another: swapcontext makes a system call per switch
// and is ten times slower than the few instructions that replace it where they are written.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_HOST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_HOST_ASAN 1
#endif
#if defined(CUDA_ON_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(CUDA_ON_HOST_UCONTEXT)
#define CUDA_ON_HOST_UCONTEXT 1
#endif
#if defined(CUDA_ON_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_on_host {

#if defined(CUDA_ON_HOST_ASAN)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kGuardBytes = 64 << 10;  // a multiple of any page size

struct Fiber {
#if defined(CUDA_ON_HOST_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;  // of the host's fiber: unknown
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
};

#if defined(CUDA_ON_HOST_UCONTEXT)
inline void raw_switch(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }
#else
#if defined(__clang__)
__attribute__((noinline))
#else
__attribute__((noipa))  // the caller must not rely on which registers this body leaves alone
#endif
inline void raw_switch(Fiber* from, Fiber* to) {
  void** save = &from->stack_pointer;
  void* load = to->stack_pointer;
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"  // the red zone
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%0)\n\t"
      "movq %1, %%rsp\n\t"
      "popq %%rax\n\t"
      "jmpq *%%rax\n"
      "1:\n\t"
      "popq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp"
      : "+D"(save), "+S"(load)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
}
#endif

// The next switch to this fiber enters `entry`, whatever the fiber was in the middle of.
inline void prepare(Fiber& fiber, unsigned number, void (*entry)()) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + kGuardBytes;
  }
  fiber.bottom = fiber.stack;
  fiber.fake_stack = nullptr;
  // Stacks that all start at the same offset into a page would compete for the same few lines of the cache.
  fiber.size = kStackBytes - number % 32 * 128;
#if defined(CUDA_ON_HOST_ASAN)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
#if defined(CUDA_ON_HOST_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.size;
  makecontext(&fiber.context, entry, 0);
#else
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.size) - 4;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;  // the return address that ends a backtrace
  fiber.stack_pointer = top;
#endif
}

}  // namespace cuda_on_host
