// The only place that knows threads. Rows go to torch's own OpenMP pool, found at run time without linking to it: a
// second runtime in the process would compete with torch's spinning workers. Where there is none (other builds of
// torch, a forked child, whose copy of the pool has lost its threads) short-lived std::threads do the same.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastloss {

// Runs body(context) on `threads` threads at once, the caller's included.
void run_team(void (*body)(void*), void* context, int threads);

// "openmp" or "threads": what run_team would use now.
const char* team_kind();

inline namespace FASTLOSS_ISA {

// fn(begin, end) over [0, rows) in chunks that whoever is free takes next. A row's result never depends on its chunk.
template <class Fn>
void parallel_for(int64_t rows, int64_t cols, int threads, Fn&& fn) {
  constexpr int64_t kElementsPerThread = 1 << 14;  // about 10 us of work
  const int64_t useful = std::min<int64_t>(rows, rows * cols / kElementsPerThread);
  const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
  if (team == 1) {
    fn(int64_t(0), rows);
    return;
  }
  struct Context {
    Fn& fn;
    std::atomic<int64_t> next;
    int64_t rows, chunk;
  } context{fn, {0}, rows, std::max<int64_t>(1, rows / (team * 16))};
  run_team(
      [](void* p) {
        auto& c = *static_cast<Context*>(p);
        for (int64_t begin; (begin = c.next.fetch_add(c.chunk)) < c.rows;)
          c.fn(begin, std::min(begin + c.chunk, c.rows));
      },
      &context, team);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
