// Kernels that prove cuda_on_host.h right: those that are correct, and those whose bugs it has to show.
// Prints a line per check, or with any argument the rate of switches. Compiled a second time with -DSECOND_UNIT it is
// the other half of a program of two translation units.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

struct Sum {
  const float* in;
  float* out;
};

// Adds 1 per thread that it is launched with, so that the translation units can tell that they share one machine.
inline __global__ void count_threads(Sum p) { *p.out += 1; }

template <class P>
cudaError_t launch(void (*kernel)(P), const P& params, dim3 grid, dim3 block, size_t shared = 0, unsigned cluster = 1) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

#if defined(SECOND_UNIT)
void launch_from_second_unit(float* out) { launch(count_threads, Sum{nullptr, out}, 1, 32); }
#else
__attribute__((weak)) void launch_from_second_unit(float* out);  // where it is linked

namespace {

int failures = 0;

void report(const char* name, bool ok, const std::string& detail = "") {
  std::printf("%s %s %s\n", ok ? "PASS" : "FAIL", name, detail.c_str());
  failures += !ok;
}

// What a launch throws, or "nothing".
template <class F>
std::string thrown_by(F f) {
  try {
    f();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "nothing";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

auto count_nan(const std::vector<float>& v) {
  return std::count_if(v.begin(), v.end(), [](float x) { return std::isnan(x); });
}

float* shared_floats() { return reinterpret_cast<float*>(cuda_on_host::shared_memory()); }

}  // namespace

// ---- Kernels that are right.

__device__ float warp_sum(float v) {
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
  return v;
}

__global__ void __launch_bounds__(1024) block_sum(Sum p) {
  float* partial = shared_floats();
  const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float v = warp_sum(p.in[blockIdx.x * blockDim.x + threadIdx.x]);
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  if (warp > 0) return;
  const float sum = warp_sum(lane < warps ? partial[lane] : 0.f);
  if (lane == 0) p.out[blockIdx.x] = sum;
}

struct Lanes {
  double* from_next;
  int64_t* broadcast;
  unsigned *ballot, *index;
};

// Two warps, the second of 16 lanes only; the first 8 lanes then go on alone.
__global__ void lanes(Lanes p) {
  const unsigned i = threadIdx.x + blockDim.x * threadIdx.y, lane = i % 32;
  const unsigned existing = i < 32 ? 0xffffffff : 0xffff;
  p.from_next[i] = __shfl_down_sync(existing, double(i), 1);
  p.broadcast[i] = __shfl_sync(existing, int64_t(i) << 40, 3);
  p.ballot[i] = __ballot_sync(existing, i % 3 == 0);
  p.index[i] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * gridDim.y + 10000 * blockDim.y;
  __syncwarp(existing);
  if (lane < 8) p.ballot[i] += 1000 * __any_sync(0xff, lane == 7) + __shfl_xor_sync(0xff, lane, 1);
}

void check_lanes() {
  std::vector<double> next(48);
  std::vector<int64_t> broadcast(48);
  std::vector<unsigned> ballot(48), index(48);
  launch(lanes, Lanes{next.data(), broadcast.data(), ballot.data(), index.data()}, dim3(2, 3, 4), dim3(12, 4));
  bool ok = true;
  for (unsigned i = 0; i < 48; ++i) {
    const unsigned first = i / 32 * 32, end = first ? 48 : 32;
    unsigned expected = 0;
    for (unsigned j = first; j < end; ++j) expected |= unsigned(j % 3 == 0) << (j - first);
    if (i % 32 < 8) expected += 1000 + (i % 32 ^ 1);
    ok = ok && ballot[i] == expected && broadcast[i] == int64_t(first + 3) << 40 && index[i] == 43321;
    if (i != 31) ok = ok && (i == 47 ? std::isnan(next[i]) : next[i] == i + 1);  // lane 16 of the last warp: not there
  }
  report("lanes", ok && next[31] == 31);
}

// Every block leaves its sum in all blocks of its cluster.
__global__ void cluster_sum(Sum p) {
  float* slots = shared_floats();
  const unsigned rank = cuda_on_host::cluster_rank(), size = cuda_on_host::cluster_size();
  cuda_on_host::cluster_sync();
  const float sum = warp_sum(p.in[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x < size) cuda_on_host::cluster_map(slots, threadIdx.x)[rank] = sum;
  cuda_on_host::cluster_sync();
  if (threadIdx.x) return;
  p.out[blockIdx.x] = 0;
  for (unsigned i = 0; i < size; ++i) p.out[blockIdx.x] += slots[i];
}

void check_sums(const char* name, void (*kernel)(Sum), unsigned grid, unsigned block, unsigned shared,
                unsigned cluster) {
  for (cuda_on_host::schedule_seed = 0; cuda_on_host::schedule_seed < 4; ++cuda_on_host::schedule_seed) {
    std::vector<float> in(grid * block), out(grid, -1.f);
    for (unsigned i = 0; i < in.size(); ++i) in[i] = float(i % 13);
    bool ok = launch(kernel, Sum{in.data(), out.data()}, grid, block, shared, cluster) == cudaSuccess;
    for (unsigned b = 0; b < grid; ++b) {
      float expected = 0;
      for (unsigned i = 0; i < cluster * block; ++i) expected += in[b / cluster * cluster * block + i];
      ok = ok && out[b] == expected;
    }
    report(name, ok, std::to_string(block) + " threads, clusters of " + std::to_string(cluster));
  }
  cuda_on_host::schedule_seed = 0;
}

// ---- Kernels with a bug that has to show.

struct Offset {
  float* out;
  int offset;
};

// Right only if threads take turns in ascending order.
__global__ void reads_its_left_neighbour(Sum p) {
  float* slots = shared_floats();
  slots[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = threadIdx.x ? slots[threadIdx.x - 1] : 0;
}

// Right only if warp 1 is not ahead of warp 0: both do the same work before they meet without a barrier.
__global__ void warps_in_step(Sum p) {
  const float v = warp_sum(p.in[threadIdx.x]);
  if (threadIdx.x == 0) shared_floats()[0] = v;
  const float w = warp_sum(p.in[threadIdx.x]);
  if (threadIdx.x >= 32) p.out[threadIdx.x] = shared_floats()[0] + w;
}

void check_missing_barriers() {
  std::vector<float> in(64, 1.f);
  for (auto kernel : {reads_its_left_neighbour, warps_in_step}) {
    std::vector<float> ascending(64), out(64);
    launch(kernel, Sum{in.data(), ascending.data()}, 1, 64, 256);
    int shown = 0;
    for (cuda_on_host::schedule_seed = 1; cuda_on_host::schedule_seed <= 8; ++cuda_on_host::schedule_seed) {
      launch(kernel, Sum{in.data(), out.data()}, 1, 64, 256);
      shown += count_nan(out) > 0;
    }
    cuda_on_host::schedule_seed = 0;
    report("missing_barrier", !count_nan(ascending) && shown > 0, std::to_string(shown) + " of 8 seeds show it");
  }
}

struct Copies {
  const float* in;
  float* out;
  int pending;
};

// Two groups in flight; what is read are the 4 floats of each.
__global__ void copy_two_groups(Copies p) {
  float* slots = shared_floats() + threadIdx.x * 8;
  slots[0] = 7;
  for (int group = 0; group < 2; ++group) {
    cuda_on_host::copy_async_16(slots + 4 * group, p.in + threadIdx.x * 8 + 4 * group);
    cuda_on_host::copy_async_commit();
  }
  if (p.pending >= 0) cuda_on_host::copy_async_wait(p.pending);
  for (int i = 0; i < 8; ++i) p.out[threadIdx.x * 8 + i] = slots[i];
}

__global__ void copy_to(Offset p) { cuda_on_host::copy_async_16(shared_floats() + p.offset, p.out); }

void check_copies() {
  std::vector<float> in(64 * 8), out(64 * 8);
  for (unsigned i = 0; i < in.size(); ++i) in[i] = float(i);
  for (int pending : {-1, 2, 1, 0}) {
    launch(copy_two_groups, Copies{in.data(), out.data(), pending}, 1, 64, 64 * 32);
    const unsigned landed = pending < 0 ? 0 : 2 - pending;
    bool ok = true;
    for (unsigned i = 0; i < in.size(); ++i) ok = ok && (i % 8 / 4 < landed ? out[i] == in[i] : std::isnan(out[i]));
    report("async_copies", ok, "at most " + std::to_string(pending) + " pending");
  }
  const std::string misaligned = thrown_by([&] { launch(copy_to, Offset{out.data(), 1}, 1, 1, 32); });
  const std::string outside = thrown_by([&] { launch(copy_to, Offset{out.data(), 4}, 1, 1, 16); });
  report("async_copy_addresses", contains(misaligned, "multiple of 16") && contains(outside, "outside"), outside);
}

__global__ void diverges(Offset p) {
  const unsigned all = 0xffffffff, i = threadIdx.x;
  if (p.offset == 0) return i < 40 ? __syncthreads() : void(__shfl_xor_sync(all, 1, 1));
  if (p.offset == 1) return void(i % 2 ? __shfl_xor_sync(all, 1, 1) : __shfl_down_sync(all, 1, 1));
  if (p.offset == 2) return __syncwarp(0xff);
  if (p.offset == 3) return i < 8 ? __syncwarp(0xffff) : __syncthreads();
  if (p.offset == 4) return blockIdx.x || i == 0 ? cuda_on_host::cluster_sync() : void(__shfl_sync(all, 1, 0));
}
__global__ void barrier_and_exit(Sum p) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  *p.out += 1;
}

void check_divergence() {
  const char* const messages[] = {"40 at __syncthreads; 24 at __shfl_xor_sync", "divergent warp",
                                  "lacks the calling lane", "56 at __syncthreads; 8 at __syncwarp",
                                  "65 at cluster_sync; 31 at __shfl_sync"};
  for (int i = 0; i < 5; ++i) {
    const std::string text = thrown_by([&] { launch(diverges, Offset{nullptr, i}, 2, 64, 0, i == 4 ? 2 : 1); });
    report("divergence", contains(text, messages[i]), text);
  }
  float count = 0;
  launch(barrier_and_exit, Sum{nullptr, &count}, 1, 64);
  report("exited_threads_do_not_count", count == 40);
}

__global__ void reads_shared(Offset p) {
  p.out[threadIdx.x] = reinterpret_cast<uintptr_t>(shared_floats()) % 128 ? 0 : shared_floats()[p.offset];
}
__global__ void writes_shared(Offset p) { shared_floats()[p.offset] = 1; }
// Block 0 looks into block 1, which may be gone: through the pointer it has, or through a new one.
__global__ void leaves_early(Offset p) {
  const float* other = cuda_on_host::cluster_map(shared_floats(), 1);
  shared_floats()[0] = 1;
  cuda_on_host::cluster_sync();
  if (blockIdx.x) return;
  __syncthreads();
  p.out[0] = (p.offset ? cuda_on_host::cluster_map(shared_floats(), 1) : other)[0];
}
__global__ void maps_foreign_memory(Offset p) { cuda_on_host::cluster_map(p.out, 0); }

void check_shared_memory() {
  std::vector<float> out(32);
  launch(writes_shared, Offset{out.data(), 2}, 1, 32, 12);
  launch(reads_shared, Offset{out.data(), 2}, 1, 32, 12);
  report("shared_memory_is_poisoned", count_nan(out) == 32);
  const std::string left = thrown_by([&] { launch(leaves_early, Offset{out.data(), 1}, 2, 32, 16, 2); });
  const std::string foreign = thrown_by([&] { launch(maps_foreign_memory, Offset{out.data(), 0}, 2, 32, 16, 2); });
  report("cluster_map_is_checked", contains(left, "has exited") && contains(foreign, "outside"), left);
#if !defined(CUDA_ON_HOST_ASAN)  // which ends the process at the access itself
  const std::string text = thrown_by([&] { launch(writes_shared, Offset{out.data(), 3}, 1, 32, 12); });
  launch(leaves_early, Offset{out.data(), 0}, 2, 32, 16, 2);
  report("shared_memory_ends", contains(text, "beyond its dynamic shared memory") && std::isnan(out[0]), text);
#endif
}

__global__ void asserts(Sum p) {
  __syncthreads();
  if (threadIdx.x == 33) __assertfail("target out of range", __FILE__, __LINE__, "asserts", 1);
  __syncthreads();
  *p.out += 1;
}

void check_assertfail() {
  float count = 0;
  bool ok = true;
  std::string text;
  for (int i = 0; i < 3; ++i) {
    text = thrown_by([&] { launch(asserts, Sum{nullptr, &count}, 4, 64); });
    ok = ok && text == "device-side assert: target out of range" && count == 0;
  }
  report("assertfail", ok, text);
  launch(count_threads, Sum{nullptr, &count}, 2, 64);
  report("launch_after_assertfail", count == 128);
}

// ---- The host's side.

void check_configurations() {
  float count = 0;
  auto is = [&](cudaError_t expected, dim3 grid, dim3 block, size_t shared = 0, unsigned cluster = 1) {
    const cudaError_t error = launch(count_threads, Sum{nullptr, &count}, grid, block, shared, cluster);
    const bool ok = error == expected && cudaGetLastError() == expected && cudaGetLastError() == cudaSuccess;
    report("configuration", ok, cudaGetErrorString(error));
  };
  is(cudaErrorInvalidConfiguration, 1, 0);
  is(cudaErrorInvalidConfiguration, 1, 1025);
  is(cudaErrorInvalidConfiguration, 1, dim3(32, 33));
  is(cudaErrorInvalidConfiguration, 0, 32);
  is(cudaErrorInvalidConfiguration, 0x80000000u, 32);
  is(cudaErrorInvalidConfiguration, dim3(1, 65536), 32);
  is(cudaErrorInvalidClusterSize, 9, 32, 0, 2);
  is(cudaErrorInvalidClusterSize, 16, 32, 0, 16);
  is(cudaErrorInvalidValue, 1, 32, 48 * 1024 + 1);
  is(cudaSuccess, 1, 32, 48 * 1024);
  bool ok = cudaFuncSetAttribute(count_threads, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449) != cudaSuccess;
  ok = ok && cudaGetLastError() == cudaErrorInvalidValue;
  ok = ok && !cudaFuncSetAttribute(count_threads, cudaFuncAttributeMaxDynamicSharedMemorySize, 232448);
  ok = ok && !cudaFuncSetAttribute(count_threads, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  report("function_attributes", ok);
  is(cudaSuccess, 1, 32, 232448);
  is(cudaErrorInvalidValue, 1, 32, 232449);
  is(cudaSuccess, 16, 32, 0, 16);
  is(cudaErrorInvalidClusterSize, 32, 32, 0, 32);
  cuda_on_host::device.shared_per_block_optin = 101376;
  cuda_on_host::device.major = 8;
  is(cudaErrorInvalidValue, 1, 32, 101377);
  is(cudaErrorNotSupported, 2, 32, 0, 2);
  int bytes = 0, major = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  report("device_attributes", bytes == 101376 && major == 8);
  cuda_on_host::device = {};
}

namespace {
__global__ void has_no_symbol(Sum) {}
}  // namespace

void check_launcher() {
  std::string seen;
  const uint64_t before = cuda_on_host::launches;
  float value = 0;
  cuda_on_host::launcher = [&](const char* name, dim3 grid, dim3 block, unsigned cluster, size_t shared,
                               const void* params, size_t bytes) {
    seen = name;
    for (size_t v : {size_t(grid.x), size_t(grid.y), size_t(block.x), size_t(cluster), shared, bytes,
                     size_t(cuda_on_host::launches - before)})
      seen += " " + std::to_string(v);
    *static_cast<const Sum*>(params)->out = 42;
  };
  launch(block_sum, Sum{nullptr, &value}, dim3(4, 5), 96, 12, 2);
  report("launcher", seen == "_Z9block_sum3Sum 4 5 96 2 12 16 1" && value == 42, seen);
  const std::string text = thrown_by([&] { launch(has_no_symbol, Sum{}, 1, 32); });
  report("kernel_without_symbol", contains(text, "-fvisibility") && contains(text, "-rdynamic"), text);
  cuda_on_host::launcher = nullptr;
}

void check_second_unit() {
  float count = 0;
  launch_from_second_unit(&count);
  report("second_unit", count == 32);
}

__global__ void many_shuffles(Sum p) {
  float v = float(threadIdx.x);
  for (int i = 0; i < 100; ++i) v = __shfl_xor_sync(0xffffffff, v, i & 31);
  __syncthreads();
  p.out[threadIdx.x] = v;
}

void measure(unsigned threads) {
  std::vector<float> out(1024);
  const uint64_t before = cuda_on_host::switches;
  const auto start = std::chrono::steady_clock::now();
  launch(many_shuffles, Sum{nullptr, out.data()}, 20, threads);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("RATE %4u threads: %.1f million switches per second\n", threads,
              double(cuda_on_host::switches - before) / seconds.count() / 1e6);
}

int main(int argc, char**) {
  if (argc > 1) return measure(32), measure(256), measure(1024), 0;
  for (unsigned threads : {32u, 96u, 512u, 1024u}) check_sums("block_sum", block_sum, 3, threads, threads / 8, 1);
  for (unsigned size : {1u, 2u, 8u}) check_sums("cluster_sum", cluster_sum, 16, 32, size * 4, size);
  check_lanes();
  check_missing_barriers();
  check_copies();
  check_divergence();
  check_shared_memory();
  check_assertfail();
  check_configurations();
  check_launcher();
  if (launch_from_second_unit) check_second_unit();
  return failures != 0;
}
#endif
