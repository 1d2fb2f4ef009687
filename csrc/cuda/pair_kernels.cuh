// The kernels over pairs of rows (divergences), for the element type of rows.cu.
#pragma once

#include "pair.cuh"

namespace fastloss {
inline namespace FASTLOSS_ISA {

template <class F>
struct PairHeader {
  Meeting<PairState<F>> states;
  Meeting<Mixture<F>> mixtures;
};
template <class F>
constexpr int64_t kPairHeaderBytes = (sizeof(PairHeader<F>) + 15) / 16 * 16;

template <class F>
FASTLOSS_DEVICE PairHeader<F>& pair_header() {
  return *reinterpret_cast<PairHeader<F>*>(shared_memory());
}
template <class E, class F = typename E::Compute>
FASTLOSS_DEVICE PairSlices<E> load_slices(const Rows& rows, const Place& at, const Cut& cut) {
  const PairSlices<E> slices(rows, at, cut, shared_memory() + kPairHeaderBytes<F>);
  slices.load();
  return slices;
}
template <class F>
FASTLOSS_DEVICE PairStats<F> pair_stats_of(const void* stats, int64_t row, int64_t N) {
  const F* p = static_cast<const F*>(stats) + row;
  return {p[0], p[N], p[2 * N], p[3 * N], p[4 * N]};
}
template <class F>
FASTLOSS_DEVICE Coefficients<F> scaled(Coefficients<F> c, F scale) {
  return {c.A * scale, c.E * scale, c.B * scale, c.C * scale, c.Q * scale};
}
template <class F>
FASTLOSS_DEVICE bool nothing_asked(const Upstream<F>& g) {
  return g.loss == 0 && g.lse == 0 && g.log_prob == 0 && g.entropy == 0;
}

// What slices of rows contribute to their rows' states.
template <class E, class F = typename E::Compute>
__global__ void __launch_bounds__(kMaxThreads, 1) pair_states(const StatesArgs a) {
  const Place at(a.cut, a.rows);
  const PairSlices<E> slices = load_slices<E>(a.rows, at, a.cut);
  const PairColumns<F> columns(a.rows, at);
  const PairState<F> s = meet(sum_up(slices, columns), pair_header<F>().states, 1, columns.of_target());
  if (threadIdx.x > 0) return;
  F* out = static_cast<F*>(a.states) + int64_t(blockIdx.x) * kStates;
  out[0] = s.centre, out[1] = s.sum, out[2] = s.target_centre, out[3] = s.target_sum, out[4] = s.tilt;
}

// What slices contribute to their rows' mixtures; needs the rows' statistics.
template <class E, class F = typename E::Compute>
__global__ void __launch_bounds__(kMaxThreads, 1) pair_mixtures(const StatesArgs a) {
  const Place at(a.cut, a.rows);
  const PairSlices<E> slices = load_slices<E>(a.rows, at, a.cut);
  PairColumns<F> columns(a.rows, at);
  columns.know(pair_stats_of<F>(a.stats, at.row, a.rows.input.rows));
  const Mixture<F> m = meet(mix(slices, columns), pair_header<F>().mixtures, 1);
  if (threadIdx.x > 0) return;
  F* out = static_cast<F*>(a.states) + int64_t(blockIdx.x) * kStates;
  out[0] = m.divergence, out[1] = m.mean;
}

// From its slices' states, or in a second round their mixtures, to a row's statistics and loss; a thread for each row.
template <class E, class F = typename E::Compute>
__global__ void __launch_bounds__(kMaxThreads, 1) pair_stats(const StatsArgs a) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, N = a.rows.input.rows;
  if (row >= N) return;
  const Spec& spec = a.rows.spec;
  PairState<F> state;
  Mixture<F> mixture;
  for (int k = 0; k < a.cut.slices; ++k) {
    const F* p = static_cast<const F*>(a.states) + (row * a.cut.slices + k) * kStates;
    if (a.mixed)
      mixture.divergence += p[0], mixture.mean += p[1];
    else
      state = merge(state, {p[0], p[1], p[2], p[3], p[4]}, spec.objective == Objective::kForwardKL);
  }
  PairStats<F> s = a.mixed ? pair_stats_of<F>(a.stats, row, N) : log_sums(spec, state);
  F value;
  s = finalize(spec, s, mixture, &value);
  const F fields[kStats] = {s.centre, s.log_sum, s.target_centre, s.target_log_sum, s.tilt};
  for (int k = 0; k < kStats; ++k) static_cast<F*>(a.stats)[k * N + row] = fields[k];
  static_cast<F*>(a.loss)[row] = value;
}

// The gradient from the statistics.
template <class E, class F = typename E::Compute>
__global__ void __launch_bounds__(kMaxThreads, 1) pair_grad(const GradArgs a) {
  if (nothing_to_do<F>(a.upstream)) return;
  const Place at(a.cut, a.rows);
  const Upstream<F> g = upstream_of<F>(a.upstream, at.row, false);
  const PairSlices<E> slices = load_slices<E>(a.rows, at, a.cut);
  const Destination<E> to(slices.x, a.grad, at.row, at.begin);
  if (nothing_asked(g)) return write_zeros(slices.x, to);
  const PairStats<F> s = pair_stats_of<F>(a.stats, at.row, a.rows.input.rows);
  PairColumns<F> columns(a.rows, at);
  columns.know(s);
  write_gradient(slices, to, scaled(coefficients(a.rows.spec, s, g), F(a.rows.spec.logit_scale)), columns);
}

// Loss and gradient while both rows are on chip: in one block's shared memory, or in that of a cluster's blocks.
template <class E, class F = typename E::Compute>
__global__ void __launch_bounds__(kMaxThreads, 1) pair_loss_grad(const LossGradArgs a) {
  if (nothing_to_do<F>(a.upstream)) return;
  const Place at(a.cut, a.rows);
  const Spec& spec = a.rows.spec;
  const PairSlices<E> slices = load_slices<E>(a.rows, at, a.cut);
  const Destination<E> to(slices.x, a.grad, at.row, at.begin);
  PairColumns<F> columns(a.rows, at);
  PairHeader<F>& header = pair_header<F>();
  const PairState<F> state = meet(sum_up(slices, columns), header.states, a.cut.slices, columns.of_target());
  PairStats<F> s = log_sums(spec, state);
  columns.know(s);
  Mixture<F> mixture;
  if (spec.objective == Objective::kJS) mixture = meet(mix(slices, columns), header.mixtures, a.cut.slices);
  F value;
  s = finalize(spec, s, mixture, &value);
  if (at.slice == 0 && threadIdx.x == 0) static_cast<F*>(a.loss)[at.row] = value;
  if (a.cut.slices > 1) cluster_sync();  // all have read each other's sums
  const Upstream<F> g = upstream_of<F>(a.upstream, at.row, false);
  if (nothing_asked(g)) return write_zeros(slices.x, to);
  write_gradient(slices, to, scaled(coefficients(spec, s, g), F(spec.logit_scale)), columns);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
