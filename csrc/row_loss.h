// The mathematics of every loss over a vocabulary, on the host and on the device:
//
//   state --finalize--> row statistics and loss --coefficients--> A E B C Q --epilogue--> gradient
//
//   dx_j = phi'(x_j) * ( A p_j + E p_j (z_j - m) - B [j=y] - C w_j - Q q_j )
//
// with z = phi(x) = softcap(logit_scale x), p = softmax(z). docs/math.md derives each line.
#pragma once

#include "row_state.h"

namespace fastloss {

// What the caller chose, the same for all rows.
struct Spec {
  double label_smoothing = 0;
  double z_loss = 0;
  double softcap = 0;  // 0: none
  double logit_scale = 1;
  bool soft = false;  // targets are class probabilities
};

inline namespace FASTLOSS_ISA {

// What one row's target contributes. `logit` + `residue` is z_y, the residue what rounding took from it in float;
// weight_sum is the sum of the class weights (V without weights).
template <class F>
struct RowTarget {
  F logit = 0;
  F residue = 0;
  F weight = 1;
  F weight_sum = 0;
};

// One row's statistics: enough for the loss, for what the caller may ask back, and for the gradient.
// The log of the sum is kept apart from the centre so that z - centre - log_sum loses nothing at |z| = 1e4.
template <class F>
struct RowStats {
  F centre, log_sum, log_prob, mass, entropy;
};

// Upstream gradients of the loss and of the differentiable statistics.
template <class F>
struct Upstream {
  F loss = 0, lse = 0, log_prob = 0, entropy = 0;
};

template <class F>
struct Coefficients {
  F A = 0, E = 0, B = 0, C = 0, Q = 0;
};

// 0 * inf := 0. A class of zero weight, or of zero probability, does not exist.
template <class F>
FASTLOSS_HD inline F times(F weight, F value) {
  return weight == 0 ? F(0) : weight * value;
}

template <class F>
FASTLOSS_HD inline RowStats<F> finalize(const Spec& spec, const RowState<F>& s, const RowTarget<F>& y, int64_t V,
                                        F* loss) {
  RowStats<F> row;
  row.centre = s.centre;
  row.log_sum = std::log(s.sum);
  row.entropy = row.log_sum - quotient(s.moment, s.sum);
  const F smooth = quotient(F(spec.label_smoothing), F(V)), sharp = 1 - F(spec.label_smoothing);
  const F spread = s.plain - times(s.mass, row.log_sum);  // sum w_j log p_j
  if (spec.soft) {
    row.log_prob = spread;
    row.mass = s.mass;
    *loss = -spread;
  } else {
    const F log_prob = ((y.logit - s.centre) + y.residue) - row.log_sum;
    row.log_prob = log_prob > 0 ? F(0) : log_prob;  // rounding must not make a probability above one
    row.mass = sharp * y.weight + smooth * y.weight_sum;
    *loss = -times(sharp * y.weight, row.log_prob) - times(smooth, spread);
  }
  const F lse = row.centre + row.log_sum;
  *loss += times(F(spec.z_loss), lse * lse);
  return row;
}

template <class F>
FASTLOSS_HD inline Coefficients<F> coefficients(const Spec& spec, const RowStats<F>& row, F target_weight, int64_t V,
                                                const Upstream<F>& g) {
  const F lse = row.centre + row.log_sum;
  Coefficients<F> c;
  c.A = g.loss * (row.mass + 2 * F(spec.z_loss) * lse) + g.lse;
  if (g.entropy != 0) {
    c.A += g.entropy * (row.log_sum - row.entropy);
    c.E = -g.entropy;
  }
  if (spec.soft) {
    c.A -= g.log_prob * row.mass;
    c.Q = g.loss - g.log_prob;
  } else {
    c.A -= g.log_prob;
    c.B = g.loss * (1 - F(spec.label_smoothing)) * target_weight - g.log_prob;
    c.C = times(quotient(F(spec.label_smoothing), F(V)), g.loss);
  }
  return c;
}

// The one epilogue, for a scalar or for a SIMD vector F; r = z - m, and r = 0 where p = 0.
template <class F, class S>
FASTLOSS_HD inline F epilogue(const Coefficients<S>& c, F p, F r, F w, F q) {
  return (c.A + c.E * r) * p - c.C * w - c.Q * q;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
