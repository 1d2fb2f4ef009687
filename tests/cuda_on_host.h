// Builds the CUDA sources with a C++ compiler and runs their kernels on the CPU, where there is no GPU:
//   g++ -std=c++17 -x c++ -include tests/cuda_on_host.h -DFASTLOSS_CUDA_ON_HOST csrc/cuda/*.cu
// Every CUDA thread is a fiber, and one cluster of blocks runs at a time on one thread of the operating system, so that
// a run is deterministic. Where CUDA leaves something undefined, this does the worst it may: memory is NaN until it is
// written, copies land as late as they can, and a seed changes which thread goes first. What no thread waits for cannot
// be seen: a kernel that spins on memory hangs here.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "cuda_on_host_threads.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace cuda_on_host {

struct Device {
  int major = 9, minor = 0;
  int multiprocessors = 132;
  int shared_per_block_optin = 232448;
  int shared_per_multiprocessor = 233472;
  int driver_version = 12080, runtime_version = 12080;
};
inline Device device;
// Called instead of running the kernel here, when it is set.
inline std::function<void(const char* mangled_kernel_name, dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                          const void* params, size_t param_bytes)>
    launcher;
inline uint64_t launches = 0;

// ---- What kernels call.

inline unsigned char* shared_memory() { return machine.thread->block->shared; }

inline void wait_at(Barrier& barrier, Wait wait) {
  machine.thread->wait = wait;
  ++barrier.waiting;
}

inline uint64_t exchange(Wait wait, unsigned mask, uint64_t value, unsigned source) {
  Thread& thread = *machine.thread;
  Warp& warp = *thread.warp;
  const unsigned lane = thread.lane;
  if (!(mask >> lane & 1)) fail(std::string("the mask of ") + name_of(wait) + " lacks the calling lane");
  thread.wait = warp.wait[lane] = wait;
  warp.mask[lane] = mask;
  warp.value[lane] = value;
  warp.source[lane] = source;
  warp.waiting |= 1u << lane;
  release_warp(warp, lane);
  suspend();
  return warp.result[lane];
}

// A lane that does not take part sends NaN.
template <class T>
T shuffle(Wait wait, unsigned mask, T value, unsigned source) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 8) && std::is_trivially_copyable<T>::value, "4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(wait, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void check_in_shared(const void* pointer, size_t bytes) {
  const size_t offset = static_cast<const unsigned char*>(pointer) - shared_memory();
  if (offset > machine.shared_bytes || bytes > machine.shared_bytes - offset)
    fail("a pointer to shared memory is outside of the block's shared memory");
}

// The data land at the wait; until then the destination is NaN, so that neither it nor what it replaces can be used.
inline void copy_async_16(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("copy_async_16 of an address that is no multiple of 16");
  check_in_shared(shared, 16);
  std::memset(shared, 0xFF, 16);
  machine.thread->copies.emplace_back(shared, global);
}

inline void copy_async_commit() { machine.thread->groups.push_back(machine.thread->copies.size()); }

inline void copy_async_wait(int pending_groups) {
  auto& copies = machine.thread->copies;
  auto& groups = machine.thread->groups;
  if (groups.size() <= size_t(pending_groups)) return;
  const size_t groups_done = groups.size() - pending_groups, done = groups[groups_done - 1];
  for (size_t i = 0; i < done; ++i) std::memcpy(copies[i].first, copies[i].second, 16);
  copies.erase(copies.begin(), copies.begin() + done);
  groups.erase(groups.begin(), groups.begin() + groups_done);
  for (size_t& end : groups) end -= done;
}

inline unsigned cluster_rank() { return machine.thread->block->rank; }
inline unsigned cluster_size() { return unsigned(machine.blocks.size()); }

inline void cluster_sync() {
  wait_at(machine.barrier, kCluster);
  release_cluster();
  suspend();
}

template <class T>
T* cluster_map(T* shared_pointer, unsigned rank) {
  check_in_shared(shared_pointer, 0);
  if (rank >= cluster_size()) fail("cluster_map to a rank beyond the cluster");
  const Block& other = machine.blocks[rank];
  if (!other.barrier.alive) fail("cluster_map to a block that has exited");
  return reinterpret_cast<T*>(
      other.shared + (reinterpret_cast<uintptr_t>(shared_pointer) - reinterpret_cast<uintptr_t>(shared_memory())));
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::Block& block = *cuda_on_host::machine.thread->block;
  cuda_on_host::wait_at(block.barrier, cuda_on_host::kBlock);
  cuda_on_host::release_block(block);
  cuda_on_host::suspend();
}
inline void __syncwarp(unsigned mask = 0xffffffff) { cuda_on_host::exchange(cuda_on_host::kSyncWarp, mask, 0, 0); }
template <class T>
T __shfl_sync(unsigned mask, T v, int lane) {
  return cuda_on_host::shuffle(cuda_on_host::kShuffle, mask, v, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask) {
  return cuda_on_host::shuffle(cuda_on_host::kShuffleXor, mask, v,
                               (cuda_on_host::machine.thread->lane ^ lane_mask) & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta) {
  const unsigned lane = cuda_on_host::machine.thread->lane;
  return cuda_on_host::shuffle(cuda_on_host::kShuffleDown, mask, v, lane + delta < 32 ? lane + delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int pred) {
  return unsigned(cuda_on_host::exchange(cuda_on_host::kBallot, mask, pred != 0, 0));
}
inline int __any_sync(unsigned mask, int pred) { return __ballot_sync(mask, pred) != 0; }

[[noreturn]] inline void __assertfail(const char* message, const char* /*file*/, unsigned /*line*/,
                                      const char* /*function*/, size_t /*char_size*/) {
  throw std::runtime_error(std::string("device-side assert: ") + message);
}

// ---- What the host calls: as much of the CUDA runtime as launching a kernel takes.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  char pad[64];
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_on_host {

struct FunctionLimits {
  int shared_bytes = 48 << 10;
  bool non_portable_cluster = false;
};
inline std::unordered_map<const void*, FunctionLimits> function_limits;
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t remember(cudaError_t error) { return error ? last_error = error : error; }

inline cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, unsigned* cluster) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads == 0 || threads > 1024 || !grid.x || !grid.y ||
      !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const FunctionLimits limits = function_limits[kernel];
  if (config.dynamicSmemBytes > size_t(limits.shared_bytes) ||
      config.dynamicSmemBytes > size_t(device.shared_per_block_optin))
    return cudaErrorInvalidValue;
  *cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& dim = config.attrs[i].val.clusterDim;
    *cluster = dim.x;
    if (device.major < 9 || dim.y > 1 || dim.z > 1) return cudaErrorNotSupported;
    if (!dim.x || !dim.y || !dim.z || grid.x % dim.x || dim.x > (limits.non_portable_cluster ? 16u : 8u))
      return cudaErrorInvalidClusterSize;
  }
  return cudaSuccess;
}

inline const char* mangled_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) && info.dli_sname && info.dli_saddr == kernel) return info.dli_sname;
  throw std::runtime_error(
      "cuda_on_host: a kernel's symbol cannot be found: kernels must be neither static nor in an anonymous namespace, "
      "compiled without -fvisibility=hidden, and in an executable linked with -rdynamic");
}

}  // namespace cuda_on_host

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
  }
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }
inline cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int index) {
  return cuda_on_host::remember(index ? cudaErrorInvalidDevice : cudaSuccess);
}
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = cuda_on_host::device.runtime_version, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = cuda_on_host::device.driver_version, cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  const cuda_on_host::Device& device = cuda_on_host::device;
  if (index) return cuda_on_host::remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = device.multiprocessors, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = device.major, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = device.minor, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = device.shared_per_multiprocessor, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = device.shared_per_block_optin, cudaSuccess;
  }
  return cuda_on_host::remember(cudaErrorInvalidValue);
}

template <class P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P), cudaFuncAttribute attribute, int value) {
  auto& limits = cuda_on_host::function_limits[reinterpret_cast<const void*>(kernel)];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    limits.non_portable_cluster = value != 0;
    return cudaSuccess;
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > cuda_on_host::device.shared_per_block_optin)
    return cuda_on_host::remember(cudaErrorInvalidValue);
  limits.shared_bytes = value;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

template <class P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, void (*)(P)) {
  return found->ptxVersion = cuda_on_host::device.major * 10 + cuda_on_host::device.minor, cudaSuccess;
}

template <class P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& params) {
  static_assert(std::is_trivially_copyable<P>::value && sizeof(P) <= 4096, "a kernel takes one plain struct");
  const void* address = reinterpret_cast<const void*>(kernel);
  unsigned cluster = 1;
  if (const cudaError_t error = cuda_on_host::check(*config, address, &cluster)) return cuda_on_host::remember(error);
  ++cuda_on_host::launches;
  const size_t shared_bytes = config->dynamicSmemBytes;
  if (cuda_on_host::launcher) {
    cuda_on_host::launcher(cuda_on_host::mangled_name(address), config->gridDim, config->blockDim, cluster,
                           shared_bytes, &params, sizeof(P));
  } else {
    cuda_on_host::run(config->gridDim, config->blockDim, cluster, shared_bytes, kernel, params);
  }
  return cudaSuccess;
}
