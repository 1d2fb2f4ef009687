#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <thread>
#include <vector>

namespace fastloss {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

// GOMP_parallel is the entry point of GNU OpenMP, which LLVM's and Intel's runtimes export too. Asking torch's library
// for it finds the very runtime torch was linked with.
GompParallel find_openmp() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib"})
    if (void* torch = dlopen(name, RTLD_LAZY | RTLD_NOLOAD))
      if (void* symbol = dlsym(torch, "GOMP_parallel")) return reinterpret_cast<GompParallel>(symbol);
  return nullptr;
}

GompParallel openmp() {
  static const GompParallel found = find_openmp();
  return forked ? nullptr : found;
}

}  // namespace

const char* team_kind() { return openmp() ? "openmp" : "threads"; }

void run_team(void (*body)(void*), void* context, int threads) {
  if (const GompParallel parallel = openmp()) {
    parallel(body, context, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(body, context);
  body(context);
  for (auto& t : team) t.join();
}

}  // namespace fastloss
