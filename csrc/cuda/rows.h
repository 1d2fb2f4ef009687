// The CUDA kernels, compiled once per element type (rows.cu); what launches them, and with how many threads
// (launch.cu).
#pragma once

#include "../rows.h"

#if !defined(FASTLOSS_CUDA_ON_HOST)
#include <cuda_runtime_api.h>
#endif

namespace fastloss {

// Upstream gradients; see backends/device.py. `loss` stands where `losses` is absent. With `unless_one` a kernel does
// nothing when the first of `losses` is one.
struct Upstreams {
  double loss = 0;
  Vector losses, lse, log_prob, entropy;
  Vector token_weight;
  const void* denominator = nullptr;
  bool unless_one = false;
};

// How rows of a length are cut: `slices` blocks for a row, each of `columns` columns but the last, `threads` in a
// block, `shared` bytes of shared memory. A function of length, element type and device: never of the number of rows.
struct Cut {
  int slices = 1;
  int64_t columns = 0;
  int threads = 0;
  int64_t shared = 0;
};

// No slice that fits into shared memory asks for more (227 KiB, 32 chunks a thread), and registers are not short.
constexpr int kMaxThreads = 512;

struct StatesArgs {
  Rows rows;
  Cut cut;
  void* states = nullptr;       // (N, slices, kStates)
  int32_t* parts = nullptr;     // (2, N, slices): argmax, and how many exceed the target; or null
  const void* stats = nullptr;  // of a second round
};

struct StatsArgs {
  Rows rows;
  Cut cut;
  const void* states = nullptr;
  const int32_t* parts = nullptr;
  void* loss = nullptr;       // (N,)
  void* stats = nullptr;      // (kStats, N)
  int64_t* argmax = nullptr;  // (N,), or null: no extras
  int64_t* rank = nullptr;    // (N,), or null
  bool mixed = false;         // the second round
};

struct GradArgs {
  Rows rows;
  Cut cut;
  const void* stats = nullptr;
  Upstreams upstream;
  Matrix grad;
};

struct LossGradArgs {
  Rows rows;
  Cut cut;
  Upstreams upstream;
  void* loss = nullptr;
  Matrix grad;
};

struct DenominatorArgs {
  Rows rows;
  Vector token_weight;
  void* out = nullptr;
};

struct TotalArgs {
  const void* loss = nullptr;
  int64_t N = 0;
  Vector token_weight;
  const void* denominator = nullptr;
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
};

struct RescaleArgs {
  Matrix grad;
  const void* upstream = nullptr;
};

template <class Args>
using Kernel = void (*)(Args);

// The kernels of one element type. `general`: softcap, smoothing, class probabilities, entropy, argmax. A target of
// several classes has statistics of its own; target logits have kernels of their own.
struct Kernels {
  Kernel<StatesArgs> row_states[2][2];  // [listed][general]
  Kernel<StatsArgs> row_stats, listed_stats;
  Kernel<GradArgs> row_grad[2][2];
  Kernel<LossGradArgs> row_loss_grad[2][2];
  Kernel<StatesArgs> pair_states, pair_mixtures;
  Kernel<StatsArgs> pair_stats;
  Kernel<GradArgs> pair_grad;
  Kernel<LossGradArgs> pair_loss_grad;
  Kernel<DenominatorArgs> denominator;
  Kernel<TotalArgs> total;
  Kernel<RescaleArgs> rescale;
  int64_t header_bytes;  // of shared memory, before the slice
  int64_t pair_header_bytes;
  int64_t chunks_per_thread;  // at most, of sixteen bytes
};

const Kernels& float32_kernels();
const Kernels& float64_kernels();
const Kernels& bfloat16_kernels();
const Kernels& float16_kernels();

}  // namespace fastloss
