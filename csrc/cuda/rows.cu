// The kernels, for the element type FASTLOSS_ELEMENT. A row is read from memory once; with a gradient to write, it
// stays in shared memory between its state and its gradient.
#include "gradient.cuh"
#include "listed.cuh"
#include "pair_kernels.cuh"
#include "rows.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

using E = FASTLOSS_ELEMENT;
using F = E::Compute;

// Shared memory: what threads tell each other, then the slice.
struct Header {
  Board<F> board;
  Gradient<F> gradient;
};
constexpr int64_t kHeaderBytes = (sizeof(Header) + 15) / 16 * 16;

FASTLOSS_DEVICE Header& header() { return *reinterpret_cast<Header*>(shared_memory()); }
FASTLOSS_DEVICE Slice<E> slice_of(const Rows& rows, const Place& at) {
  return Slice<E>(rows.input.row(at.row), at.begin, at.end, shared_memory() + kHeaderBytes);
}
// After the slice, if there is one.
FASTLOSS_DEVICE Listed<F> listed_of(const Rows& rows, int64_t columns = 0) {
  const int64_t before = columns ? slice_bytes(columns, sizeof(E::Storage)) : 0;
  return Listed<F>(rows, shared_memory() + kHeaderBytes + before);
}

// Tells the block how its slice's gradient is computed. Warp 0.
template <bool kListed, bool kGeneral>
FASTLOSS_DEVICE void say_gradient(const Rows& rows, const Listed<F>& listed, const RowStats<F>& s,
                                  const RowTarget<F>& target, int64_t y, const Upstream<F>& g, F scale) {
  Gradient<F> out = kListed ? gradient_of<kGeneral>(rows, listed, s, g) : gradient_of<kGeneral>(rows, s, target, y, g);
  if (!kGeneral) choose_form(out, scale, sizeof(E::Storage) == 2);
  if (lane_id() == 0) header().gradient = out;
}

// What slices of rows contribute to their rows' states.
template <bool kListed, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 1) row_states(const StatesArgs a) {
  const Place at(a.cut, a.rows);
  if (a.rows.ignored(at.row)) return;  // it is not read
  const Slice<E> slice = slice_of(a.rows, at);
  Columns<F> columns(a.rows, at.row, at.begin);
  if (kGeneral && a.parts && a.rows.spec.objective == Objective::kIndex)
    columns.rival = element<F>(a.rows.input.row(at.row), a.rows.input.dtype, target_of(a.rows, at.row));
  const Listed<F> listed = listed_of(a.rows, a.cut.columns);
  const bool tail = kListed && a.rows.spec.objective == Objective::kTopKTail;
  slice.load();
  if (tail) {
    listed.fill(a.rows, at.row, columns, at.begin, at.end);
    listed.hide(slice, at.begin);
  }
  const Part<F> part = reduce<kGeneral>(slice, columns, header().board);
  if (threadIdx.x > 0) return;
  const RowState<F>& s = part.state;
  F* out = static_cast<F*>(a.states) + int64_t(blockIdx.x) * kStates;
  out[0] = s.centre, out[1] = s.sum, out[2] = s.moment, out[3] = s.plain, out[4] = s.mass;
  if (a.parts) a.parts[blockIdx.x] = part.argmax, a.parts[gridDim.x + blockIdx.x] = part.above;
}

// A row's state from its slices', always in the same order.
FASTLOSS_DEVICE RowState<F> merged(const StatsArgs& a, int64_t row, int64_t* argmax, int64_t* above) {
  RowState<F> state;
  *argmax = *above = 0;
  const int64_t slices = a.cut.slices;
  for (int64_t at = row * slices, k = 0; k < slices; ++k, ++at) {
    const F* p = static_cast<const F*>(a.states) + at * kStates;
    const RowState<F> part{p[0], p[1], p[2], p[3], p[4]};
    if (a.parts) {
      if (part.centre > state.centre) *argmax = k * a.cut.columns + a.parts[at];
      *above += a.parts[a.rows.input.rows * slices + at];
    }
    state = merge(state, part);
  }
  return state;
}

FASTLOSS_DEVICE void write_stats(const StatsArgs& a, int64_t row, RowStats<F> s, F loss, int64_t argmax,
                                 int64_t above) {
  const F fields[kStats] = {s.centre, s.log_sum, s.log_prob, s.mass, s.entropy};
  for (int k = 0; k < kStats; ++k) static_cast<F*>(a.stats)[k * a.rows.input.rows + row] = fields[k];
  static_cast<F*>(a.loss)[row] = loss;
  if (a.argmax) a.argmax[row] = argmax;
  if (a.rank) a.rank[row] = above;
}

// From the states of its slices to a row's statistics and loss; a thread for each row.
__global__ void __launch_bounds__(kMaxThreads, 1) row_stats(const StatsArgs a) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= a.rows.input.rows) return;
  F value = 0;
  RowStats<F> s{0, 0, 0, 0, 0};
  int64_t argmax = 0, above = 0;
  if (!a.rows.ignored(row)) {
    const RowState<F> state = merged(a, row, &argmax, &above);
    const Columns<F> columns(a.rows, row, 0);
    const RowTarget<F> target = row_target(a.rows, row, target_of(a.rows, row), columns, state);
    s = finalize(a.rows.spec, state, target, a.rows.input.cols, &value);
    balance(s, state.sum);
  }
  write_stats(a, row, s, value, argmax, above);
}

// The same where a target lists classes; a block for each row.
__global__ void __launch_bounds__(kMaxThreads, 1) listed_stats(const StatsArgs a) {
  const int64_t row = blockIdx.x;
  const Columns<F> columns(a.rows, row, 0);
  const Listed<F> listed = listed_of(a.rows);
  listed.fill(a.rows, row, columns, 0, a.rows.input.cols);
  __syncthreads();
  if (warp_id() > 0) return;
  F value = 0;
  RowStats<F> s{0, 0, 0, 0, 0};
  int64_t argmax = 0, above = 0;
  if (!a.rows.ignored(row)) s = finish_listed(a.rows, listed, merged(a, row, &argmax, &above), columns.scale, &value);
  if (lane_id() == 0) write_stats(a, row, s, value, argmax, above);
}

// The gradient from the statistics.
template <bool kListed, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 1) row_grad(const GradArgs a) {
  if (nothing_to_do<F>(a.upstream)) return;
  const Place at(a.cut, a.rows);
  const Slice<E> slice = slice_of(a.rows, at);
  const Columns<F> columns(a.rows, at.row, at.begin);
  Gradient<F>& gradient = header().gradient;
  const Listed<F> listed = listed_of(a.rows);
  if (kListed) {
    listed.fill(a.rows, at.row, columns, at.begin, at.end);
    __syncthreads();
  }
  if (kListed ? warp_id() == 0 : threadIdx.x == 0) {
    const int64_t N = a.rows.input.rows, y = target_of(a.rows, at.row);
    const F* p = static_cast<const F*>(a.stats) + at.row;
    const RowStats<F> s{p[0], p[N], p[2 * N], p[3 * N], p[4 * N]};
    const Upstream<F> g = upstream_of<F>(a.upstream, at.row, a.rows.ignored(at.row));
    const bool mine = y >= at.begin && y < at.end;  // another block may have overwritten it already
    const RowTarget<F> target = row_target(a.rows, at.row, mine ? y : -1, columns, RowState<F>{});
    say_gradient<kListed, kGeneral>(a.rows, listed, s, target, mine ? y : -1, g, columns.scale);
  }
  __syncthreads();
  const Destination<E> to(slice, a.grad, at.row, at.begin);
  if (gradient.form == Form::kZero) return write_zeros(slice, to);
  write_gradient<kGeneral, Source::kGlobal>(slice, to, gradient, columns);
  if (!kListed) return;
  __syncthreads();
  write_listed<kGeneral>(listed, to, gradient, a.rows, columns);
}

// Loss and gradient while the row is on chip: in one block's shared memory, or in that of a cluster's blocks.
template <bool kListed, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 1) row_loss_grad(const LossGradArgs a) {
  if (nothing_to_do<F>(a.upstream)) return;
  const Place at(a.cut, a.rows);
  const Slice<E> slice = slice_of(a.rows, at);
  const Destination<E> to(slice, a.grad, at.row, at.begin);
  F* loss = static_cast<F*>(a.loss) + at.row;
  if (a.rows.ignored(at.row)) {
    if (at.slice == 0 && threadIdx.x == 0) *loss = 0;
    return write_zeros(slice, to);
  }
  const int64_t y = target_of(a.rows, at.row);
  const Columns<F> columns(a.rows, at.row, at.begin);
  const Listed<F> listed = listed_of(a.rows, a.cut.columns);
  const bool tail = kListed && a.rows.spec.objective == Objective::kTopKTail;
  Board<F>& board = header().board;
  slice.load();
  if (kListed) listed.fill(a.rows, at.row, columns, 0, a.rows.input.cols);
  if (tail) listed.hide(slice, at.begin);
  const Part<F> part = join_blocks<kGeneral>(reduce<kGeneral>(slice, columns, board), board, a.cut.slices);
  if (kListed) __syncthreads();
  Gradient<F>& gradient = header().gradient;
  if (kListed ? warp_id() == 0 : threadIdx.x == 0) {
    F value;
    RowStats<F> s;
    RowTarget<F> target;
    if (kListed) {
      s = finish_listed(a.rows, listed, part.state, columns.scale, &value);
    } else {
      target = row_target(a.rows, at.row, y, columns, part.state);
      s = finalize(a.rows.spec, part.state, target, a.rows.input.cols, &value);
      balance(s, part.state.sum);
    }
    if (at.slice == 0 && threadIdx.x == 0) *loss = value;
    say_gradient<kListed, kGeneral>(a.rows, listed, s, target, y, upstream_of<F>(a.upstream, at.row, false),
                                    columns.scale);
  }
  __syncthreads();
  if (a.cut.slices > 1) cluster_sync();  // all have read the target and each other's parts
  if (gradient.form == Form::kZero) return write_zeros(slice, to);
  write_gradient<kGeneral, Source::kShared>(slice, to, gradient, columns);
  if (!kListed) return;
  __syncthreads();
  write_listed<kGeneral>(listed, to, gradient, a.rows, columns);
}

// A block's sum of f(i), i < n, in a fixed order; thread 0 knows it.
template <class Fn>
FASTLOSS_DEVICE F sum_block(int64_t n, Fn&& f) {
  F sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += f(i);
  F* board = reinterpret_cast<F*>(shared_memory());
  sum = sum_lanes(sum);
  if (lane_id() == 0) board[warp_id()] = sum;
  __syncthreads();
  const int warps = int(blockDim.x) / kWarp;
  return sum_lanes(lane_id() < warps ? board[lane_id()] : F(0));
}

// What a mean divides by: the summed weights of the rows that count. One block.
__global__ void __launch_bounds__(1024) denominator(const DenominatorArgs a) {
  const F sum = sum_block(a.rows.input.rows, [&](int64_t i) {
    if (a.rows.ignored(i)) return F(0);
    const int64_t y = target_of(a.rows, i);
    return a.token_weight.at(i, F(1)) * (y < 0 ? F(1) : class_weight<F>(a.rows, y));
  });
  if (threadIdx.x == 0) *static_cast<F*>(a.out) = sum;
}

// The reduced loss. One block.
__global__ void __launch_bounds__(1024) total(const TotalArgs a) {
  const F* loss = static_cast<const F*>(a.loss);
  F sum = sum_block(a.N, [&](int64_t i) {  // a row of no weight may hold anything
    const F w = a.token_weight.at(i, F(1));
    return w == 0 ? F(0) : times(loss[i], w);
  });
  if (threadIdx.x > 0) return;
  if (a.denominator) sum = quotient(sum, scalar<F>(a.denominator));
  switch (a.out_dtype) {
    case DType::kFloat64:
      *static_cast<double*>(a.out) = double(sum);
      break;
    case DType::kBFloat16:
      *static_cast<uint16_t*>(a.out) = BFloat16::put(float(sum));
      break;
    case DType::kFloat16:
      *static_cast<uint16_t*>(a.out) = Float16::put(float(sum));
      break;
    default:
      *static_cast<float*>(a.out) = float(sum);
  }
}

// grad *= upstream, unless that is one. A block for each row.
__global__ void __launch_bounds__(kMaxThreads, 1) rescale(const RescaleArgs a) {
  const F upstream = scalar<F>(a.upstream);
  if (upstream == 1) return;
  const int64_t row = blockIdx.x;
  const Slice<E> slice(a.grad.row(row), 0, a.grad.cols, nullptr);
  const Destination<E> to(slice, a.grad, row, 0);
  for_chunks<Source::kGlobal, kBatch<E>>(slice, to, [&](const E::Chunk& in, int) {
    F v[E::kCount];
    E::unpack(in, v);
    for (F& x : v) x *= upstream;
    return E::pack(v);
  });
}

}  // namespace FASTLOSS_ISA

const Kernels& FASTLOSS_KERNELS() {
  static const Kernels kernels{
      {{row_states<false, false>, row_states<false, true>}, {row_states<true, false>, row_states<true, true>}},
      row_stats,
      listed_stats,
      {{row_grad<false, false>, row_grad<false, true>}, {row_grad<true, false>, row_grad<true, true>}},
      {{row_loss_grad<false, false>, row_loss_grad<false, true>},
       {row_loss_grad<true, false>, row_loss_grad<true, true>}},
      pair_states<E>,
      pair_mixtures<E>,
      pair_stats<E>,
      pair_grad<E>,
      pair_loss_grad<E>,
      denominator,
      total,
      rescale,
      kHeaderBytes,
      kPairHeaderBytes<F>,
      kChunksPerThread<E>};
  return kernels;
}

}  // namespace fastloss
