// From the elements of a slice to the state of a row: within a thread, over the lanes of a warp, the warps of a block,
// the blocks of a cluster. Always in the same order: a row's bits depend on its numbers and its length alone.
#pragma once

#include <type_traits>

#include "../rows.h"
#include "slice.cuh"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// Everything about the row that its columns need one by one. Without `kGeneral` kernels nothing but scale is read.
template <class F>
struct Columns {
  const void* probs = nullptr;  // of this row, or null: class indices
  DType probs_dtype = DType::kFloat32;
  const F* weight = nullptr;
  F smooth = 0, sharp = 1;  // eps / V, 1 - eps
  F cap = 0;
  F inner = 0;         // softcap: z = cap tanh(inner x)
  F scale = 1;         // z = scale u, u the softcapped logit, which has scale 1
  int64_t begin = 0;   // the slice's first column
  F rival = INFINITY;  // logits above it are counted
  bool hides = false;  // a logit of -inf is not there, whatever the softcap would make of it

  FASTLOSS_DEVICE Columns(const Rows& rows, int64_t row, int64_t begin) : begin(begin) {
    const Spec& spec = rows.spec;
    scale = F(spec.logit_scale);
    if (spec.softcap > 0) {
      cap = F(spec.softcap);
      inner = quotient(F(spec.logit_scale), cap);
      scale = 1;
    }
    smooth = quotient(F(spec.label_smoothing), F(rows.input.cols));
    sharp = 1 - F(spec.label_smoothing);
    weight = static_cast<const F*>(rows.weight.data);
    hides = spec.objective == Objective::kTopKTail;
    if (spec.soft()) probs = rows.probs.row(row), probs_dtype = rows.probs.dtype;
  }

  FASTLOSS_DEVICE F bent(F x) const { return cap > 0 && !(hides && x == -INFINITY) ? cap * std::tanh(x * inner) : x; }
  FASTLOSS_DEVICE F class_weight(int j) const { return weight ? weight[begin + j] : F(1); }
  // q' of class j: its probability, smoothed and weighted.
  FASTLOSS_DEVICE F probability(int j) const {
    return class_weight(j) * (sharp * element<F>(probs, probs_dtype, begin + j) + smooth);
  }
};

// Exponentials e^(x scale - M) around the largest logit so far, M being scale times it but for rounding. Near zero, the
// centre is rounded in powers of two, and both roundings are put right in the sums: that saves a multiplication for
// each logit.
struct NearCentre {
  float shift = INFINITY, right = 1;

  FASTLOSS_DEVICE void move(float top, float M, float scale) {
    shift = top * (scale * kLog2E);
    right = put_right(top, M, scale, scale * kLog2E);
  }
  // sum(e): e(x) as above.
  template <class Sum>
  FASTLOSS_DEVICE float around(float M, float scale, Sum&& sum) const {
    const float rate = scale * kLog2E, from = -shift;
    if (fabsf(shift) < kNear) return right * sum([=](float x) { return exp2_flushed(fused(x, rate, from)); });
    return sum([=](float x) { return exponential(difference(x, scale, M)); });
  }
};
struct FarCentre {
  FASTLOSS_DEVICE void move(double, double, double) {}
  template <class Sum>
  FASTLOSS_DEVICE double around(double M, double scale, Sum&& sum) const {
    return sum([=](double x) { return exponential(difference(x, scale, M)); });
  }
};

// What threads and blocks say of their columns: the state, the column of its maximum, how many exceed the rival.
template <class F>
struct Part {
  RowState<F> state;
  int argmax = INT32_MAX, above = 0;
};

// The sums of one thread that plain cross-entropy needs. The centre is finite from the start, so that no difference of
// infinities makes a NaN.
template <class E>
struct PlainSums {
  using F = typename E::Compute;
  static constexpr int K = E::kCount;
  F top = Limits<F>::kLowest, centre = Limits<F>::kLowest, sum = 0;
  std::conditional_t<sizeof(F) == 4, NearCentre, FarCentre> exponentials;

  FASTLOSS_DEVICE explicit PlainSums(const Columns<F>&) {}

  template <int kChunks>
  FASTLOSS_DEVICE void add(const typename E::Chunk (&c)[kChunks], const Columns<F>& columns) {
    if (const F t = E::top(c); t >= top) {  // it may be the lowest of all numbers
      const F M = larger(centre, product(t, columns.scale));
      exponentials.move(t, M, columns.scale);
      sum *= exponential(centre - M);
      top = t;
      centre = M;
    }
    sum += exponentials.around(centre, columns.scale, [&](auto&& e) { return sum_of(c, e); });
  }

  FASTLOSS_DEVICE RowState<F> state() const {
    RowState<F> s;
    if (sum != 0) s.centre = centre;  // NaN too
    s.sum = sum;
    return s;
  }
  FASTLOSS_DEVICE Part<F> part() const { return {state()}; }

 private:
  template <int kChunks, class Exp>
  static FASTLOSS_DEVICE F sum_of(const typename E::Chunk (&c)[kChunks], Exp&& e) {
    F part[4] = {0, 0, 0, 0};
    for (int k = 0; k < kChunks; ++k) {
      F v[K];
      E::unpack(c[k], v);
      for (int i = 0; i < K; ++i) part[i % 4] += e(v[i]);
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
};

// All sums, and the place of the maximum.
template <class E>
struct AllSums {
  using F = typename E::Compute;
  static constexpr int K = E::kCount;
  RowState<F> sums;
  F best = -INFINITY;
  int where = INT32_MAX, above = 0;
  bool plain;

  FASTLOSS_DEVICE explicit AllSums(const Columns<F>& columns) : plain(columns.probs || columns.smooth > 0) {}

  FASTLOSS_DEVICE Part<F> part() const { return {sums, where, above}; }

  // A group whose first column is `first`.
  FASTLOSS_DEVICE void add(const typename E::Chunk& c, int first, int count, const Columns<F>& columns) {
    F u[K], M = sums.centre;
    E::unpack(c, u);
    for (int i = 0; i < K; ++i) {
      const bool here = first + i < count;
      above += here && u[i] > columns.rival;
      u[i] = here ? columns.bent(u[i]) : -INFINITY;
      if (u[i] > best) best = u[i], where = first + i;
      M = larger(M, product(u[i], columns.scale));
    }
    sums = recentre(sums, M);
    const F at = M == -INFINITY ? F(0) : M;
    for (int i = 0; i < K; ++i) {
      const F t = difference(u[i], columns.scale, at), e = exponential(t);
      sums.sum += e;
      sums.moment += e > 0 ? e * t : F(0);
      if (!plain || first + i >= count) continue;
      const F w = columns.probs ? columns.probability(first + i) : columns.class_weight(first + i);
      sums.plain += times(w, t);
      sums.mass += w;
    }
  }
};

template <class T>
FASTLOSS_DEVICE T sum_lanes(T v) {
  for (int d = kWarp / 2; d; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

// One state out of a warp's: all moved to the largest centre, then added up.
template <bool kGeneral, class F>
FASTLOSS_DEVICE Part<F> join_lanes(const Part<F>& part) {
  F M = part.state.centre;
  for (int d = kWarp / 2; d; d /= 2) M = larger(M, __shfl_xor_sync(kAllLanes, M, d));
  const RowState<F> s = recentre(part.state, M);
  Part<F> all;
  all.state.centre = M;
  all.state.sum = sum_lanes(s.sum);
  if (!kGeneral) return all;
  all.state.moment = sum_lanes(s.moment);
  all.state.plain = sum_lanes(s.plain);
  all.state.mass = sum_lanes(s.mass);
  all.above = sum_lanes(part.above);
  all.argmax = part.state.centre == M ? part.argmax : INT32_MAX;
  for (int d = kWarp / 2; d; d /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, all.argmax, d);
    all.argmax = other < all.argmax ? other : all.argmax;
  }
  return all;
}

// In shared memory, before the slice.
template <class F>
struct Board {
  Part<F> warps[kWarp];
  Part<F> block;
};

// One part out of a block's; warp 0 knows it.
template <bool kGeneral, class F>
FASTLOSS_DEVICE Part<F> join_warps(Part<F> part, Board<F>& board) {
  part = join_lanes<kGeneral>(part);
  const int warps = int(blockDim.x) / kWarp;
  if (warps == 1) return part;
  if (lane_id() == 0) board.warps[warp_id()] = part;
  __syncthreads();
  if (warp_id() > 0) return part;
  part = lane_id() < warps ? board.warps[lane_id()] : Part<F>{};
  return join_lanes<kGeneral>(part);
}

// One part out of a cluster's; warp 0 of every block knows it. No block may end before all have read: cluster_sync().
template <bool kGeneral, class F>
FASTLOSS_DEVICE Part<F> join_blocks(Part<F> part, Board<F>& board, int blocks) {
  if (blocks == 1) return part;
  if (threadIdx.x == 0) board.block = part;
  cluster_sync();
  if (warp_id() > 0) return part;
  part = lane_id() < blocks ? *cluster_map(&board.block, unsigned(lane_id())) : Part<F>{};
  return join_lanes<kGeneral>(part);
}

// Until the copies of stage s are there.
template <int kStage = 0>
FASTLOSS_DEVICE void wait_for_stage(int s) {
  if (kStage == kStages - 1 || s == kStage)
    copy_async_wait<kStages - 1 - kStage>();
  else
    wait_for_stage<(kStage + 1) % kStages>(s);
}

// The state of a slice, loaded on the way; warp 0 knows it.
template <bool kGeneral, bool kAligned, class E, class F = typename E::Compute>
FASTLOSS_DEVICE Part<F> sum_up(const Slice<E>& slice, const Columns<F>& columns) {
  std::conditional_t<kGeneral, AllSums<E>, PlainSums<E>> sums(columns);
  const int groups = slice.groups();
  if (!kAligned) {
    copy_async_wait<0>();
    __syncthreads();
  }
#pragma unroll 1
  for (int s = 0, first = int(threadIdx.x); s < kStages && first < groups; ++s, first += kBatch<E> * int(blockDim.x)) {
    const int step = int(blockDim.x);
    if (kAligned) wait_for_stage(s);
    if constexpr (kGeneral) {
#pragma unroll 1
      for (int g = first; g < groups && g < first + kBatch<E> * step; g += step)
        sums.add(slice.template group<kAligned>(g), g * E::kCount, slice.count, columns);
    } else {
      typename E::Chunk c[kBatch<E>];
      slice.template batch<kAligned>(first, step, c);
      sums.add(c, columns);
    }
  }
  return sums.part();
}

// Of a slice whose copies are under way.
template <bool kGeneral, class E, class F = typename E::Compute>
FASTLOSS_DEVICE Part<F> reduce(const Slice<E>& slice, const Columns<F>& columns, Board<F>& board) {
  const Part<F> part =
      slice.lead == 0 ? sum_up<kGeneral, true>(slice, columns) : sum_up<kGeneral, false>(slice, columns);
  return join_warps<kGeneral>(part, board);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
