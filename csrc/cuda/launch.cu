#include <algorithm>
#include <stdexcept>

#include "launch.h"
#include "slice.cuh"

namespace fastloss {
namespace {

// Bytes of a row that a block of the two-kernel path reads: enough blocks for few long rows, enough work for a block.
constexpr int64_t kSliceBytes = 32 << 10;
// With clusters a block takes at most this much of a row, so that three blocks share a multiprocessor of 228 KiB: while
// one computes, the others' copies are under way.
constexpr int64_t kClusterBytes = 72 << 10;
constexpr int kMaxCluster = 8;  // what every device with clusters can schedule

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next launch must not inherit it
  throw std::runtime_error(std::string(what) + ": CUDA says " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "reading a device attribute");
  return value;
}

const Kernels& kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return float64_kernels();
    case DType::kBFloat16:
      return bfloat16_kernels();
    case DType::kFloat16:
      return float16_kernels();
    default:
      return float32_kernels();
  }
}

// The architecture that the kernels' code on the current device was written for: PTX of an older one knows no clusters.
int code_version(DType dtype) {
  cudaFuncAttributes found = {};
  check(cudaFuncGetAttributes(&found, kernels(dtype).row_loss_grad[0][0]), "looking for the kernels' code");
  return found.ptxVersion;
}

template <class Args>
void launch(Kernel<Args> kernel, const Args& args, int64_t blocks, int threads, int64_t shared, Stream stream,
            int cluster = 1) {
  if (blocks == 0) return;
  if (blocks >= int64_t(1) << 31) throw std::invalid_argument("input: too many rows for one launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.stream = reinterpret_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute in_cluster = {};
  if (cluster > 1) {
    in_cluster.id = cudaLaunchAttributeClusterDimension;
    in_cluster.val.clusterDim.x = unsigned(cluster);
    in_cluster.val.clusterDim.y = in_cluster.val.clusterDim.z = 1;
    config.attrs = &in_cluster;
    config.numAttrs = 1;
  }
  if (shared > 48 << 10) {  // more than a kernel gets without asking; always all there is, for other threads' launches
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  }
  check(cudaLaunchKernelEx(&config, kernel, args), "launching a kernel");
}

// Whether anything but maximum and sum of exponentials is needed of a row.
bool general(const Spec& spec) { return spec.soft() || spec.softcap > 0 || spec.label_smoothing > 0; }

int threads_for(int64_t columns, DType dtype) {
  const int64_t chunks = columns * size_of(dtype) / 16 + 2, each = kernels(dtype).chunks_per_thread;
  return int(((chunks + each - 1) / each + kWarp - 1) / kWarp * kWarp);
}

int64_t listed_bytes(const Rows& rows) { return listed_bytes(rows, rows.input.dtype == DType::kFloat64 ? 8 : 4); }

Cut cut_into(int slices, const Rows& rows) {
  const DType dtype = rows.input.dtype;
  const int64_t V = rows.input.cols, size = size_of(dtype), count = 16 / size;
  Cut cut;
  cut.slices = slices;
  cut.columns = ((V + slices - 1) / slices + count - 1) / count * count;  // whole groups, but for the last
  cut.threads = threads_for(cut.columns, dtype);
  cut.shared = rows.spec.paired() ? kernels(dtype).pair_header_bytes + 2 * slice_bytes(cut.columns, size)
                                  : kernels(dtype).header_bytes + listed_bytes(rows) + slice_bytes(cut.columns, size);
  return cut;
}

}  // namespace

Cut states_cut(const Rows& rows) {
  const int64_t bytes = rows.input.cols * size_of(rows.input.dtype);
  const int64_t slices = std::max<int64_t>(1, (bytes + kSliceBytes - 1) / kSliceBytes);
  if (slices >= int64_t(1) << 31) throw std::invalid_argument("input: too many classes for one launch");
  return cut_into(int(slices), rows);
}

Cut chip_cut(int device, const Rows& rows) {
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const bool clusters = code_version(rows.input.dtype) >= 90;
  for (int slices = 1; slices <= (clusters ? kMaxCluster : 1); slices *= 2) {
    const Cut cut = cut_into(slices, rows);
    const bool more = clusters && slices < kMaxCluster;
    if (cut.shared <= (more ? std::min(most, kClusterBytes) : most) && cut.threads <= kMaxThreads) return cut;
  }
  Cut none;
  none.slices = 0;
  return none;
}

void launch_row_stats(const StatsArgs& given, void* states, int32_t* parts, Stream stream) {
  constexpr int kThreads = 128;
  StatsArgs args = given;
  const Matrix& x = args.rows.input;
  const Spec& spec = args.rows.spec;
  args.cut = states_cut(args.rows);
  args.states = states;
  args.parts = parts;
  const Kernels& k = kernels(x.dtype);
  const StatesArgs slices{args.rows, args.cut, states, parts, args.stats};
  const auto for_slices = [&](Kernel<StatesArgs> kernel) {
    launch(kernel, slices, x.rows * args.cut.slices, args.cut.threads, args.cut.shared, stream);
  };
  const auto for_rows = [&](Kernel<StatsArgs> kernel) {
    launch(kernel, args, (x.rows + kThreads - 1) / kThreads, kThreads, 0, stream);
  };
  if (spec.listed()) {
    for_slices(k.row_states[1][parts || general(spec)]);
    launch(k.listed_stats, args, x.rows, kThreads, k.header_bytes + listed_bytes(args.rows), stream);
  } else if (!spec.paired()) {
    for_slices(k.row_states[0][parts || general(spec)]);
    for_rows(k.row_stats);
  } else {
    if (!args.mixed) {
      for_slices(k.pair_states);
      for_rows(k.pair_stats);
    }
    if (spec.objective != Objective::kJS) return;
    args.mixed = true;
    for_slices(k.pair_mixtures);
    for_rows(k.pair_stats);
  }
}

void launch_row_grad(GradArgs args, Stream stream) {
  const Matrix& x = args.rows.input;
  const Kernels& k = kernels(x.dtype);
  args.cut = states_cut(args.rows);
  const int64_t blocks = x.rows * args.cut.slices;
  if (args.rows.spec.paired()) return launch(k.pair_grad, args, blocks, args.cut.threads, args.cut.shared, stream);
  const bool all = general(args.rows.spec) || args.upstream.entropy.present();
  launch(k.row_grad[args.rows.spec.listed()][all], args, blocks, args.cut.threads,
         k.header_bytes + listed_bytes(args.rows), stream);
}

void launch_row_loss_grad(LossGradArgs args, Stream stream) {
  const Matrix& x = args.rows.input;
  const Kernels& k = kernels(x.dtype);
  args.cut = chip_cut(stream.device, args.rows);
  if (args.cut.slices == 0) throw std::invalid_argument("input: rows do not fit on chip");
  launch(args.rows.spec.paired() ? k.pair_loss_grad : k.row_loss_grad[args.rows.spec.listed()][general(args.rows.spec)],
         args, x.rows * args.cut.slices, args.cut.threads, args.cut.shared, stream, args.cut.slices);
}

void launch_denominator(const DenominatorArgs& args, Stream stream) {
  launch(kernels(args.rows.input.dtype).denominator, args, 1, 1024, 32 * sizeof(double), stream);
}

void launch_total(const TotalArgs& args, DType compute, Stream stream) {
  launch(kernels(compute).total, args, 1, 1024, 32 * sizeof(double), stream);
}

void launch_rescale(const RescaleArgs& args, Stream stream) {
  launch(kernels(args.grad.dtype).rescale, args, args.grad.rows, 256, 0, stream);
}

std::string cannot_run(int device) try {
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 8) return "its kernels need compute capability 8.0";
  code_version(DType::kFloat32);
  return "";
} catch (const std::runtime_error& error) {
  return error.what();
}

std::string driver_report() {
  int runtime = 0, driver = 0, devices = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  const std::string built = "runtime " + std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10);
  if (driver == 0) return built + ", no CUDA driver on this machine";
  const std::string found =
      built + ", driver for CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return found + ", no device: " + cudaGetErrorString(error);
  return found + ", " + std::to_string(devices) + " device" + (devices == 1 ? "" : "s");
}

}  // namespace fastloss
