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

// What the target of a row is, and what is asked of the logits against it; the list is Objective's in spec.py.
enum class Objective : int { kIndex, kProbs, kTopK, kTopKTail, kForwardKL, kReverseKL, kJS };

// What the caller chose, the same for all rows.
struct Spec {
  double label_smoothing = 0;
  double z_loss = 0;
  double softcap = 0;  // 0: none
  double logit_scale = 1;
  Objective objective = Objective::kIndex;
  double target_scale = 1;  // of target logits
  double beta = 0.5;        // of kJS

  FASTLOSS_HD bool soft() const { return objective == Objective::kProbs; }  // targets are class probabilities
  FASTLOSS_HD bool listed() const { return objective == Objective::kTopK || objective == Objective::kTopKTail; }
  FASTLOSS_HD bool indexed() const { return objective == Objective::kIndex || listed(); }
  FASTLOSS_HD bool paired() const { return int(objective) >= int(Objective::kForwardKL); }  // targets are logits
};

inline namespace FASTLOSS_ISA {

// What one row's target contributes. `logit` + `residue` is z_y, the residue what rounding took from it in float;
// weight_sum is the sum of the class weights (V without weights). Of a list: sum q_k w_k (z_k - m) and sum q_k w_k.
template <class F>
struct RowTarget {
  F logit = 0;
  F residue = 0;
  F weight = 1;
  F weight_sum = 0;
  F plain = 0;
  F mass = 0;
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
  if (spec.soft()) {
    row.log_prob = spread;
    row.mass = s.mass;
    *loss = -spread;
  } else if (spec.listed()) {
    row.log_prob = y.plain - times(y.mass, row.log_sum);
    row.mass = sharp * y.mass + smooth * y.weight_sum;
    *loss = -times(sharp, row.log_prob) - times(smooth, spread);
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
  if (spec.soft()) {
    c.A -= g.log_prob * row.mass;
    c.Q = g.loss - g.log_prob;
  } else if (spec.listed()) {  // B: times q_k w_k
    c.B = g.loss * (1 - F(spec.label_smoothing));
    c.C = times(quotient(F(spec.label_smoothing), F(V)), g.loss);
  } else {
    c.A -= g.log_prob;
    c.B = g.loss * (1 - F(spec.label_smoothing)) * target_weight - g.log_prob;
    c.C = times(quotient(F(spec.label_smoothing), F(V)), g.loss);
  }
  return c;
}

// A target of some classes and, as one class, all others: the tail, whose exponentials are kept about their own centre,
// so that they keep their digits where the tail is nearly nothing.
template <class F>
struct TailStats {
  F centre, log_sum;  // of the tail
  F lse, log_prob;    // of all; of the tail: log P(tail)
  F mass, rest;       // of the target: of all; of the tail
};

// What is left of one may be rounding; of a tail without classes it would weigh infinitely.
constexpr double kRounding = 1e-5;

// `tail`: the others' state. `y`: the listed ones' sums, about `centre`, and `log_sum` that of all about it.
template <class F>
FASTLOSS_HD inline TailStats<F> finalize_tail(const Spec& spec, const RowState<F>& tail, const RowTarget<F>& y,
                                              F centre, F log_sum, F* loss) {
  TailStats<F> row{0, 0, centre + log_sum, -INFINITY, 0, 0};
  if (tail.sum > 0) {
    row.centre = tail.centre;
    row.log_sum = std::log(tail.sum);
    const F log_prob = (tail.centre - centre) + (row.log_sum - log_sum);
    row.log_prob = log_prob > 0 ? F(0) : log_prob;
  }
  row.rest = y.mass < 1 ? 1 - y.mass : F(0);
  if (!(tail.sum > 0) && row.rest < F(kRounding)) row.rest = 0;
  row.mass = y.mass + row.rest;
  *loss = -(y.plain - times(y.mass, log_sum)) - times(row.rest, row.log_prob);
  *loss += times(F(spec.z_loss), row.lse * row.lse);
  return row;
}

// A: times e^(z_j - m_tail) / s_tail of a class of the tail.
template <class F>
FASTLOSS_HD inline Coefficients<F> coefficients(const Spec& spec, const TailStats<F>& row, F g) {
  Coefficients<F> c;
  c.A = g * ((row.mass + 2 * F(spec.z_loss) * row.lse) * std::exp(row.log_prob) - row.rest);
  c.B = g;
  return c;
}

// Of a divergence from target logits: both centres and log-sums, and E[r] (KL) or E[log(p / m)] (JS).
template <class F>
struct PairStats {
  F centre, log_sum, target_centre, target_log_sum, tilt;
};

// f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)), without taking one from the other: a number of two digits less than
// f's where f is a hundredth. By the polynomial of Cephes' logf; of float64, with s = f / (f + 2), by the series of
// log(1 + f) = 2 atanh(s). For a scalar F = S or a SIMD vector F of S.
template <class S, class F>
FASTLOSS_HD inline F excess(F f) {
  if constexpr (sizeof(S) == 4) {
    constexpr S kPoly[] = {S(7.0376836292e-2),  S(-1.1514610310e-1), S(1.1676998740e-1),
                           S(-1.2420140846e-1), S(1.4249322787e-1),  S(-1.6668057665e-1),
                           S(2.0000714765e-1),  S(-2.4999993993e-1), S(3.3333331174e-1)};
    F p = f * kPoly[0] + kPoly[1];
    for (int i = 2; i < 9; ++i) p = p * f + kPoly[i];
    return f * f * (S(0.5) - f * p);
  } else {
    const F s = quotient(f, f + 2), square = s * s;
    F p = square * (S(1) / 23) + S(1) / 21;
    for (int i = 19; i >= 3; i -= 2) p = p * square + S(1) / S(i);
    return s * (f - 2 * square * p);
  }
}

// The second round over a row, m = beta q + (1 - beta) p: the sum of beta q log(q / m) + (1 - beta) p log(p / m), and
// that of p log(p / m), which is the mean that each entry of the gradient lacks.
//
// Where p and q are alike both logarithms are of the first order of d = q - p, and their sum is of the second. With
// x = d / m, (p - m) / m = -beta x and (q - m) / m = (1 - beta) x, entries are
//
//   beta (1 - beta) d x - beta q excess((1 - beta) x) - (1 - beta) p excess(-beta x)
//
// which takes nothing of the first order from another. None is negative, and parts of a row add up.
template <class F>
struct Mixture {
  F divergence = 0, mean = 0;
};

template <class F>
FASTLOSS_HD inline PairStats<F> log_sums(const Spec& spec, const PairState<F>& s) {
  PairStats<F> row{s.centre, std::log(s.sum), s.target_centre, std::log(s.target_sum), F(0)};
  if (spec.objective == Objective::kForwardKL) row.tilt = quotient(s.tilt, s.target_sum);
  if (spec.objective == Objective::kReverseKL) row.tilt = quotient(s.tilt, s.sum);
  return row;
}

template <class F>
FASTLOSS_HD inline PairStats<F> finalize(const Spec& spec, PairStats<F> row, const Mixture<F>& m, F* loss) {
  if (spec.objective == Objective::kForwardKL) {
    *loss = (row.tilt - row.target_log_sum) + row.log_sum;
  } else if (spec.objective == Objective::kReverseKL) {
    *loss = (row.tilt - row.log_sum) + row.target_log_sum;
  } else {
    row.tilt = m.mean;
    *loss = m.divergence;
  }
  const F lse = row.centre + row.log_sum;
  *loss += times(F(spec.z_loss), lse * lse);
  return row;
}

// Q multiplies q_j (forward KL) or p_j log(p_j / m_j) (JS); r_j = (z_j - m_z) - (u_j - m_u).
template <class F>
FASTLOSS_HD inline Coefficients<F> coefficients(const Spec& spec, const PairStats<F>& row, const Upstream<F>& g) {
  Coefficients<F> c;
  c.A = g.loss * times(2 * F(spec.z_loss), row.centre + row.log_sum) + g.lse;
  if (spec.objective == Objective::kForwardKL) {
    c.A += g.loss;
    c.Q = g.loss;
  } else if (spec.objective == Objective::kReverseKL) {
    c.A -= g.loss * row.tilt;
    c.E = g.loss;
  } else {
    c.A -= g.loss * F(1 - spec.beta) * row.tilt;
    c.Q = -g.loss * F(1 - spec.beta);
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
