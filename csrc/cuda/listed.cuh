// The classes that a target lists (top-k), in shared memory: each once, with its logit and its share of the target.
// What they contribute to their row's loss, and their entries of its gradient.
#pragma once

#include "gradient.cuh"

namespace fastloss {
inline namespace FASTLOSS_ISA {

template <class F>
struct Listed {
  int count;                // of picks, not of classes
  int64_t *given, *column;  // column: -1 where ignored, or listed before
  F *probs, *logit, *share;

  FASTLOSS_DEVICE Listed(const Rows& rows, unsigned char* memory)
      : count(rows.spec.listed() ? int(rows.picks) : 0),
        given(reinterpret_cast<int64_t*>(memory)),
        column(given + count),
        probs(reinterpret_cast<F*>(column + count)),
        logit(probs + count),
        share(logit + count) {}

  // All threads; a barrier must follow. Logits are read of columns from `begin` to `end` only: others may be gradients
  // by now.
  FASTLOSS_DEVICE void fill(const Rows& rows, int64_t row, const Columns<F>& columns, int64_t begin,
                            int64_t end) const {
    const int me = int(threadIdx.x), step = int(blockDim.x);
    for (int k = me; k < count; k += step) {
      given[k] = rows.target[row * rows.picks + k];
      probs[k] = reinterpret_cast<const F*>(rows.probs.row(row))[k];
    }
    __syncthreads();
    for (int k = me; k < count; k += step) {
      const int64_t j = given[k];
      column[k] = -1, logit[k] = 0, share[k] = 0;
      if (j == rows.ignore_index) continue;
      FASTLOSS_ASSERT(j >= 0 && j < rows.input.cols, "target: class index out of bounds");
      bool before = false;
      F sum = 0;
      for (int i = 0; i < count; ++i) {
        if (given[i] != j) continue;
        before = before || i < k;
        sum += probs[i];
      }
      if (before) continue;
      column[k] = j;
      share[k] = sum * class_weight<F>(rows, j);
      if (j >= begin && j < end) logit[k] = columns.bent(element<F>(rows.input.row(row), rows.input.dtype, j));
    }
  }

  // Takes the classes out of a slice in shared memory, for the state of all others. All threads.
  template <class E>
  FASTLOSS_DEVICE void hide(const Slice<E>& slice, int64_t begin) const {
    copy_async_wait<0>();
    __syncthreads();  // after fill(), too
    auto* elements = reinterpret_cast<typename E::Storage*>(slice.stage) + slice.lead;
    for (int k = int(threadIdx.x); k < count; k += int(blockDim.x)) {
      const int64_t j = column[k] - begin;
      if (column[k] >= 0 && j >= 0 && j < slice.count) elements[j] = E::put(-INFINITY);
    }
    __syncthreads();
  }

  // What follows is for the lanes of one warp together.

  template <class Fn>
  FASTLOSS_DEVICE F sum(Fn&& f) const {
    F s = 0;
    for (int k = lane_id(); k < count; k += kWarp) s += column[k] >= 0 ? f(k) : F(0);
    return sum_lanes(s);
  }
  FASTLOSS_DEVICE F mass() const {
    return sum([&](int k) { return share[k]; });
  }
  FASTLOSS_DEVICE RowTarget<F> target(F scale, F centre) const {
    RowTarget<F> y;
    y.mass = mass();
    y.plain = sum([&](int k) { return times(share[k], difference(logit[k], scale, centre)); });
    return y;
  }
  FASTLOSS_DEVICE F top(F scale, F least) const {
    for (int k = lane_id(); k < count; k += kWarp)
      if (column[k] >= 0) least = larger(least, product(logit[k], scale));
    for (int d = kWarp / 2; d; d /= 2) least = larger(least, __shfl_xor_sync(kAllLanes, least, d));
    return least;
  }
};

// Statistics and loss from the state of a row. Of a tail the state is the others', and the statistics are: its centre
// and log-sum, its log-probability, and the log-sum and centre of all. One warp.
template <class F>
FASTLOSS_DEVICE RowStats<F> finish_listed(const Rows& rows, const Listed<F>& listed, const RowState<F>& state, F scale,
                                          F* loss) {
  RowStats<F> s;
  if (rows.spec.objective == Objective::kTopKTail) {
    const F centre = listed.top(scale, state.centre);
    const F others = state.sum > 0 ? state.sum * exponential(state.centre - centre) : F(0);
    const F sum = others + listed.sum([&](int k) { return exponential(difference(listed.logit[k], scale, centre)); });
    const TailStats<F> tail =
        finalize_tail(rows.spec, state, listed.target(scale, centre), centre, F(std::log(sum)), loss);
    RowStats<F> all{centre, F(std::log(sum)), 0, 0, 0};
    balance(all, sum);
    s = {tail.centre, tail.log_sum, tail.log_prob, all.log_sum, all.centre};
  } else {
    RowTarget<F> y = listed.target(scale, state.centre);
    y.weight_sum = state.mass;
    s = finalize(rows.spec, state, y, rows.input.cols, loss);
  }
  balance(s, state.sum);
  return s;
}

// One warp. The listed classes' own entries follow from `listed_A` and so on, see entry_of().
template <bool kGeneral, class F>
FASTLOSS_DEVICE Gradient<F> gradient_of(const Rows& rows, const Listed<F>& listed, const RowStats<F>& s,
                                        const Upstream<F>& g) {
  const Spec& spec = rows.spec;
  Coefficients<F> c;
  F A = 0, centre = s.centre, log_sum = s.log_sum;
  if (spec.objective == Objective::kTopKTail) {
    const F mass = listed.mass(), rest = mass < 1 ? 1 - mass : F(0);
    const TailStats<F> tail{s.centre, s.log_sum, s.entropy + s.mass, s.log_prob, mass + rest, rest};
    c = coefficients(spec, tail, g.loss);
    A = g.loss * (tail.mass + 2 * F(spec.z_loss) * tail.lse);
    centre = s.entropy, log_sum = s.mass;
  } else {
    c = coefficients(spec, s, F(1), rows.input.cols, g);
    A = c.A;
  }
  Gradient<F> out = spread_of<kGeneral>(rows, s, c, g);
  out.listed_A = A * F(spec.logit_scale), out.listed_centre = centre, out.listed_log_sum = log_sum;
  return out;
}

// The listed classes' entries, over what the others' formula gave them; after a barrier.
template <bool kGeneral, class E, class F = typename E::Compute>
FASTLOSS_DEVICE void write_listed(const Listed<F>& listed, const Destination<E>& to, const Gradient<F>& g,
                                  const Rows& rows, const Columns<F>& columns) {
  Coefficients<F> c = g.c;
  c.A = g.listed_A;
  for (int k = int(threadIdx.x); k < listed.count; k += int(blockDim.x)) {
    const int64_t j = listed.column[k] - columns.begin;
    if (listed.column[k] < 0 || j < 0 || j >= to.count) continue;
    c.B = g.c.B * listed.share[k];
    const F t = difference(listed.logit[k], columns.scale, g.listed_centre);
    const F weight = class_weight<F>(rows, listed.column[k]);
    const F dx = entry_of<kGeneral>(c, t, g.listed_log_sum, weight);
    to.data[j] = E::put(columns.cap > 0 ? dx * bend(listed.logit[k], columns.cap) : dx);
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
