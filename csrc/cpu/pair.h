// One row of logits beside one of target logits, as divergences need it. Both are read from memory once, tile by tile,
// into a PairState; what their gradient is made of stays in two per-thread rows (L2). A mixture's divergences (JS) take
// a second round over those, which knows both sums.
#pragma once

#include <cmath>

#include "pair_tiles.h"
#include "row.h"
#include "workspace.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

template <class F>
class Pair {
 public:
  Pair(const Rows& rows, Workspace<F>& ws)
      : rows_(rows),
        ws_(ws),
        spec_(rows.spec),
        V_(rows.input.cols),
        cap_(F(spec_.softcap)),
        scale_(cap_ > 0 ? F(1) : F(spec_.logit_scale)) {}

  // The loss of row i; gradient() may follow.
  template <bool>
  double loss(int64_t i) {
    stats_ = log_sums(spec_, reduce(i));
    return finish();
  }

  // What this part of row i contributes to the loss of the whole, whose statistics are given.
  double loss_within(int64_t i, const PairStats<double>& whole) {
    reduce(i);
    stats_ = whole;
    return finish();
  }

  const PairStats<double>& stats() const { return stats_; }

  // The gradient of row i, or of a part of it, from statistics.
  void gradient(int64_t i, const PairStats<double>& stats, const Upstream<double>& g, const Gradient& to) {
    reduce(i);
    stats_ = stats;
    if (spec_.objective == Objective::kJS) mix();  // leaves what the gradient is made of
    gradient(i, g, to);
  }

  void gradient(int64_t i, const Upstream<double>& g, const Gradient& to) {
    const Coefficients<double> c = coefficients(spec_, stats_, g);
    const F scale = F(spec_.logit_scale);
    const bool mixed = spec_.objective == Objective::kJS;
    for_tiles<F>(V_, [&](int64_t j, int64_t n, int64_t t) {
      PairGradient<F> tile{F(c.A + c.E * stats_.tilt) * scale, F(c.E) * scale, F(c.Q) * scale, 0, 0};
      if (!mixed) {
        tile.A *= probability(t), tile.E *= probability(t);
        if (spec_.objective == Objective::kForwardKL) tile.Q *= target_probability(t);
        const double r = ((centre(t) - stats_.centre) - (target_centre(t) - stats_.target_centre)) - stats_.tilt;
        tile.r = F(r), tile.residue = F(r - double(tile.r));
      }
      pair_gradient_tile<F>(ws_.row + j, ws_.target_row + j, padded<F>(n), tile, ws_.tile);
      if (cap_ > 0) {
        read_logits(i, j, n, ws_.probs);
        bend_tile<F>(ws_.tile, ws_.probs, n, cap_);
      }
      write_tile<F>(ws_.tile, F(1), to.row + j * size_of(to.dtype), to.dtype, n, to.streaming);
    });
  }

 private:
  const Rows& rows_;
  Workspace<F>& ws_;
  const Spec& spec_;
  const int64_t V_;
  const F cap_, scale_;
  PairStats<double> stats_ = {};

  double finish() {
    Mixture<double> mixture;
    if (spec_.objective == Objective::kJS) mixture = mix();
    double value;
    stats_ = finalize(spec_, stats_, mixture, &value);
    return value;
  }

  double centre(int64_t t) const { return ws_.centre[t]; }
  double target_centre(int64_t t) const { return ws_.target_centre[t]; }
  // What turns the exponentials of tile t into probabilities.
  F probability(int64_t t) const { return F(std::exp((centre(t) - stats_.centre) - stats_.log_sum)); }
  F target_probability(int64_t t) const {
    return F(std::exp((target_centre(t) - stats_.target_centre) - stats_.target_log_sum));
  }

  void read_logits(int64_t i, int64_t j, int64_t n, F* buf) const {
    const DType dtype = rows_.input.dtype;
    read_tile<F>(rows_.input.row(i) + j * size_of(dtype), dtype, n, buf);
    if (cap_ > 0) softcap_tile<F>(buf, padded<F>(n), cap_, F(spec_.logit_scale));
    pad_tile<F>(buf, n, -INFINITY);
  }

  PairState<double> reduce(int64_t i) {
    const bool of_target = spec_.objective == Objective::kForwardKL;
    PairState<double> state;
    for_tiles<F>(V_, [&](int64_t j, int64_t n, int64_t t) {
      const DType dtype = rows_.teacher.dtype;
      F *z = ws_.tile, *u = ws_.probs;
      const int64_t np = padded<F>(n);
      read_logits(i, j, n, z);
      read_tile<F>(rows_.teacher.row(i) + j * size_of(dtype), dtype, n, u);
      pad_tile<F>(u, n, -INFINITY);
      const F top = tile_max<Native<F>, F>(z, np), target_top = tile_max<Native<F>, F>(u, np);
      const PairTile<F> tile{z, u, finite(top), finite(target_top), scale_, F(spec_.target_scale)};
      const PairSums<F> sums = sum_up(tile, np, ws_.row + j, ws_.target_row + j);
      const PairState<double> part{double(top) * double(scale_), sums.sum, double(target_top) * spec_.target_scale,
                                   sums.target_sum, sums.tilt};
      ws_.centre[t] = finite(part.centre), ws_.target_centre[t] = finite(part.target_centre);
      state = merge(state, part, of_target);
    });
    return state;
  }

  PairSums<F> sum_up(const PairTile<F>& tile, int64_t n, F* a, F* b) const {
    switch (spec_.objective) {
      case Objective::kForwardKL:
        return pair_tile<Objective::kForwardKL>(tile, n, a, b);
      case Objective::kReverseKL:
        return pair_tile<Objective::kReverseKL>(tile, n, a, b);
      default:
        return pair_tile<Objective::kJS>(tile, n, a, b);
    }
  }

  Mixture<double> mix() {
    Mixture<double> all;
    for_tiles<F>(V_, [&](int64_t j, int64_t n, int64_t t) {
      const Mixture<double> part = mixture_tile<F>(ws_.row + j, ws_.target_row + j, padded<F>(n), probability(t),
                                                   target_probability(t), F(spec_.beta), F(1 - spec_.beta));
      all.divergence += part.divergence, all.mean += part.mean;
    });
    return all;
  }

  // Nothing but -inf has no centre; its exponentials are zero about any.
  template <class T>
  static T finite(T centre) {
    return centre == -INFINITY ? T(0) : centre;
  }
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
