// The threads of one cluster of blocks: what they wait for, whose turn it is, their shared memory, their life.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_on_host_fibers.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
// Plain variables, not macros: cudaLaunchConfig_t has members of these names.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

inline uint64_t switches = 0;
// 0: threads take turns in ascending order. Otherwise: in a pseudo-random order, and some warps fall far behind others.
inline uint64_t schedule_seed = [] {
  const char* seed = std::getenv("CUDA_ON_HOST_SEED");
  return seed ? std::strtoull(seed, nullptr, 0) : 0;
}();

// ---- What is where.

enum Wait { kNothing, kBlock, kCluster, kSyncWarp, kShuffle, kShuffleXor, kShuffleDown, kBallot, kExited };

inline const char* name_of(int wait) {
  static const char* const names[] = {"nothing",          "__syncthreads", "cluster_sync",
                                      "__syncwarp",       "__shfl_sync",   "__shfl_xor_sync",
                                      "__shfl_down_sync", "__ballot_sync", "the exit"};
  return names[wait];
}

// Threads that wait for one another; those that have exited do not count.
struct Barrier {
  unsigned alive = 0, waiting = 0;
  bool complete() const { return alive > 0 && waiting == alive; }
};

struct Block {
  Barrier barrier;
  uint3 index{};
  unsigned rank = 0;
  bool started = false;
  unsigned char* shared = nullptr;
};

struct Warp {
  unsigned alive = 0, waiting = 0, first_thread = 0;
  unsigned mask[32];
  Wait wait[32];
  unsigned source[32];  // the lane whose value this lane is to receive
  uint64_t value[32], result[32];
};

struct Thread : Fiber {
  uint3 index{};
  unsigned lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Wait wait = kNothing;
  bool idle = false;  // at the top of its loop, ready to be any thread of any kernel
  std::vector<std::pair<void*, const void*>> copies;
  std::vector<size_t> groups;  // where in `copies` each committed group ends
};

struct Machine {
  std::mutex mutex;
  Fiber host;
  Fiber* running = &host;
  Fiber* previous = nullptr;
  Thread* thread = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> sweep, released;
  size_t position = 0;
  uint64_t random = 0, sweeps = 0, draws = 0;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  unsigned threads_per_block = 0;
  Barrier barrier;  // of the cluster
  size_t shared_bytes = 0;
  std::exception_ptr failure;
  void (*call)(const void* kernel, const void* params) = nullptr;
  const void* kernel = nullptr;
  const void* params = nullptr;
};
inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
  std::string where;
  if (const Thread* t = machine.thread) {
    where = " (block " + std::to_string(t->block->index.x) + "," + std::to_string(t->block->index.y) + "," +
            std::to_string(t->block->index.z) + " thread " + std::to_string(t->index.x) + "," +
            std::to_string(t->index.y) + "," + std::to_string(t->index.z) + ")";
  }
  throw std::runtime_error("cuda_on_host: " + what + where);
}

// ---- Whose turn it is.

inline void arrived_on_stack() {
#if defined(CUDA_ON_HOST_ASAN)
  __sanitizer_finish_switch_fiber(machine.running->fake_stack, &machine.previous->bottom, &machine.previous->size);
#endif
}

inline void switch_to(Fiber& to, Thread* thread) {
  machine.previous = std::exchange(machine.running, &to);
  machine.thread = thread;
  if (thread) threadIdx = thread->index, blockIdx = thread->block->index;
  ++switches;
#if defined(CUDA_ON_HOST_ASAN)
  __sanitizer_start_switch_fiber(&machine.previous->fake_stack, to.bottom, to.size);
#endif
  raw_switch(machine.previous, &to);
  arrived_on_stack();
}

inline uint64_t scramble(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline void begin_sweep() {
  Machine& m = machine;
  m.position = 0;
  m.sweep.clear();
  m.sweep.swap(m.released);
  if (!schedule_seed) return;
  for (size_t i = m.sweep.size(); i > 1; --i)
    std::swap(m.sweep[i - 1], m.sweep[scramble(m.random ^ ++m.draws << 32) % i]);
  // For some sweeps at a time half of the warps stand still, unless nobody else can go on.
  const uint64_t epoch = scramble(m.random + m.sweeps++ / 16);
  size_t kept = 0;
  for (Thread* t : m.sweep) {
    if (scramble(epoch ^ t->warp->first_thread) & 1)
      m.sweep[kept++] = t;
    else
      m.released.push_back(t);
  }
  m.sweep.resize(kept);
  if (!kept) m.sweep.swap(m.released);
}

inline std::string deadlock() {
  std::string text = "deadlock: not every thread reaches what the others wait for:";
  const size_t count = machine.blocks.size() * machine.threads_per_block;
  for (int wait = kBlock; wait <= kExited; ++wait) {
    size_t waiting = 0;
    for (size_t i = 0; i < count; ++i) waiting += machine.threads[i]->wait == wait;
    if (waiting) text += " " + std::to_string(waiting) + " at " + name_of(wait) + ";";
  }
  text.back() = '.';
  return text;
}

// Gives the turn to the next thread that can go on, and returns when it is this fiber's turn again.
inline void suspend() {
  Machine& m = machine;
  if (m.position == m.sweep.size()) begin_sweep();
  if (!m.failure && m.position < m.sweep.size()) {
    Thread* next = m.sweep[m.position++];
    if (next != m.running) switch_to(*next, next);
    return;
  }
  if (!m.failure && m.barrier.alive) {
    try {
      fail(deadlock());
    } catch (...) {
      m.failure = std::current_exception();
    }
  }
  switch_to(m.host, nullptr);
}

inline void release(Thread& thread) {
  thread.wait = kNothing;
  machine.released.push_back(&thread);
}

inline void release(Barrier& barrier, Wait wait, size_t first, size_t count) {
  barrier.waiting = 0;
  for (size_t i = first; i < first + count; ++i) {
    if (machine.threads[i]->wait == wait) release(*machine.threads[i]);
  }
}

inline void release_block(Block& block) {
  if (block.barrier.complete())
    release(block.barrier, kBlock, block.rank * machine.threads_per_block, machine.threads_per_block);
}

inline void release_cluster() {
  if (machine.barrier.complete())
    release(machine.barrier, kCluster, 0, machine.blocks.size() * machine.threads_per_block);
}

// The lanes of `mask` go on, if all have come. Results are handed out here, before any lane can send its next value.
inline void release_warp(Warp& warp, unsigned first_lane) {
  const unsigned mask = warp.mask[first_lane], group = mask & warp.alive;
  if ((warp.waiting & group) != group) return;
  uint64_t ballot = 0;
  for (unsigned rest = group; rest; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    if (warp.mask[lane] != mask || warp.wait[lane] != warp.wait[first_lane]) {
      fail("divergent warp: lane " + std::to_string(first_lane) + " is at " + name_of(warp.wait[first_lane]) +
           ", lane " + std::to_string(lane) + " at " + name_of(warp.wait[lane]) + ", or their masks differ");
    }
    ballot |= uint64_t(warp.value[lane] != 0) << lane;
  }
  warp.waiting &= ~group;
  for (unsigned rest = group; rest; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest), source = warp.source[lane];
    warp.result[lane] = warp.wait[lane] == kBallot ? ballot : group >> source & 1 ? warp.value[source] : ~uint64_t(0);
    release(*machine.threads[warp.first_thread + lane]);
  }
}

// ---- The life of a thread.

inline void poison(Block& block) {
  if (machine.shared_bytes) std::memset(block.shared, 0xFF, machine.shared_bytes);
}

#if defined(CUDA_ON_HOST_ASAN)
constexpr size_t kCanaryBytes = 0;
inline void set_accessible(Block& block, bool accessible) {
  (accessible ? __asan_unpoison_memory_region : __asan_poison_memory_region)(block.shared, machine.shared_bytes);
}
#else
constexpr size_t kCanaryBytes = 64;
inline void set_accessible(Block&, bool) {}
#endif

// Not before its first thread runs: what another block of the cluster wrote earlier than that is lost on a GPU as well.
inline void start(Block& block) {
  if (std::exchange(block.started, true)) return;
  set_accessible(block, true);
  poison(block);
  std::memset(block.shared + machine.shared_bytes, 0xA5, kCanaryBytes);
}

inline void finish(Block& block) {
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (block.shared[machine.shared_bytes + i] != 0xA5) fail("the block wrote beyond its dynamic shared memory");
  }
  if (machine.blocks.size() == 1) return;
  poison(block);  // other blocks may still hold pointers to it
  set_accessible(block, false);
}

inline void leave(Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  thread.wait = kExited;
  warp.alive &= ~(1u << thread.lane);
  --block.barrier.alive;
  --machine.barrier.alive;
  for (unsigned rest = warp.waiting, lane; rest; rest &= ~warp.mask[lane])
    release_warp(warp, lane = __builtin_ctz(rest));
  release_block(block);
  release_cluster();
  if (!block.barrier.alive) finish(block);
}

inline void fiber_main() {
  arrived_on_stack();
  for (;;) {
    Thread& thread = *machine.thread;
    thread.idle = false;
    try {
      start(*thread.block);
      machine.call(machine.kernel, machine.params);
      leave(thread);
    } catch (...) {
      machine.failure = std::current_exception();
    }
    thread.idle = true;
    suspend();
  }
}

inline void prepare(unsigned number, const Block& block) {
  Machine& m = machine;
  if (number == m.threads.size()) m.threads.push_back(std::make_unique<Thread>());
  Thread& thread = *m.threads[number];
  if (!thread.idle) prepare(thread, number, fiber_main);
  const unsigned i = number - block.rank * m.threads_per_block;
  thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  thread.lane = i % 32;
  thread.block = &m.blocks[block.rank];
  thread.warp = &m.warps[block.rank * ((m.threads_per_block + 31) / 32) + i / 32];
  if (!thread.lane) *thread.warp = Warp(), thread.warp->first_thread = number;
  thread.warp->alive |= 1u << thread.lane;
  thread.idle = true;
  thread.copies.clear();
  thread.groups.clear();
  release(thread);
}

inline void run_cluster(uint3 first) {
  Machine& m = machine;
  const unsigned threads = m.threads_per_block;
  m.sweep.clear();
  m.released.clear();
  m.position = 0;
  m.barrier = {unsigned(m.blocks.size() * threads), 0};
  for (Block& block : m.blocks) {
    block.index = {first.x + block.rank, first.y, first.z};
    block.barrier = {threads, 0};
    block.started = false;
    if (m.blocks.size() > 1) set_accessible(block, false);
    for (unsigned i = 0; i < threads; ++i) prepare(block.rank * threads + i, block);
  }
  suspend();
  if (m.failure) std::rethrow_exception(std::exchange(m.failure, nullptr));
}

template <class P>
void run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*kernel)(P), const P& params) {
  Machine& m = machine;
  std::lock_guard<std::mutex> lock(m.mutex);
  m.call = [](const void* k, const void* p) { reinterpret_cast<void (*)(P)>(k)(*static_cast<const P*>(p)); };
  m.kernel = reinterpret_cast<const void*>(kernel);
  m.params = &params;
  gridDim = grid;
  blockDim = block;
  m.threads_per_block = block.x * block.y * block.z;
  m.shared_bytes = shared_bytes;
  m.random = scramble(schedule_seed);
  m.sweeps = m.draws = 0;
  m.warps.resize(cluster * ((m.threads_per_block + 31) / 32));
  m.blocks.assign(cluster, Block());
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory;
  for (unsigned i = 0; i < cluster; ++i) {
    void* bytes = nullptr;
    if (posix_memalign(&bytes, 128, shared_bytes + kCanaryBytes)) throw std::bad_alloc();
    memory.emplace_back(bytes, std::free);
    m.blocks[i].rank = i;
    m.blocks[i].shared = static_cast<unsigned char*>(bytes);
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) run_cluster({x, y, z});
}

}  // namespace cuda_on_host
