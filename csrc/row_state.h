// The state of one row (token) over some part of the vocabulary, and how two parts merge. Merging is associative and
// commutative with RowState{} as its unit, so the same function joins SIMD tiles, warps, blocks of a row, and ranks.
//
//   centre m: the maximum of the z_j, or near it; -inf while there is none
//   sum    s = sum e^(z_j - m)
//   moment t = sum e^(z_j - m) (z_j - m)        entropy needs it
//   plain  b = sum w_j (z_j - m)                label smoothing and class probabilities need it
//   mass     = sum w_j
//
// `plain` is centred like the moment: logits near 1e4 must not cost the loss its digits.
#pragma once

#include <cmath>

#include "view.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// a / b. On a GPU a division is a call, around which registers are spilled: there it is a reciprocal, corrected.
template <class F>
FASTLOSS_HD inline F quotient(F a, F b) {
#if defined(__CUDA_ARCH__)
  F r;
  if constexpr (sizeof(F) == 4) {
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(b));
  } else {
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(b));
    for (int i = 0; i < 2; ++i) {
      const F better = fma(fma(-b, r, F(1)), r, r);
      r = better == better ? better : r;  // of zero or infinity
    }
  }
  const F q = a * r, corrected = fma(fma(-b, q, a), r, q);
  return corrected == corrected ? corrected : q;
#else
  return a / b;
#endif
}

template <class F>
struct RowState {
  F centre = -INFINITY;
  F sum = 0;
  F moment = 0;
  F plain = 0;
  F mass = 0;
};

// Move a state to a new centre M >= a.centre. A part that is empty or all -inf weighs nothing and moves nowhere: no
// NaN.
template <class F>
FASTLOSS_HD inline RowState<F> recentre(const RowState<F>& a, F M) {
  if (a.centre == M || a.centre == -INFINITY) return {M, a.sum, a.moment, a.plain, a.mass};
  const F d = a.centre - M;
  const F k = std::exp(d);
  const F moment = k == 0 ? F(0) : k * (a.moment + d * a.sum);  // d may be as large as numbers get: a finite mask
  return {M, k * a.sum, moment, a.plain + (a.mass != 0 ? d * a.mass : F(0)), a.mass};
}

template <class F>
FASTLOSS_HD inline RowState<F> merge(const RowState<F>& a, const RowState<F>& c) {
  const F M = a.centre > c.centre ? a.centre : c.centre;
  const RowState<F> x = recentre(a, M), y = recentre(c, M);
  return {M, x.sum + y.sum, x.moment + y.moment, x.plain + y.plain, x.mass + y.mass};
}

// The state of a row of logits z beside one of target logits u (divergences): each one's centre and sum, and
//
//   tilt = sum e^(u_j - m_u) ((u_j - m_u) - (z_j - m_z))    where the expectation is the target's
//   tilt = sum e^(z_j - m_z) ((z_j - m_z) - (u_j - m_u))    where it is the logits'
template <class F>
struct PairState {
  F centre = -INFINITY;
  F sum = 0;
  F target_centre = -INFINITY;
  F target_sum = 0;
  F tilt = 0;
};

template <class F>
FASTLOSS_HD inline PairState<F> recentre(const PairState<F>& a, F M, F U, bool of_target) {
  const F d = a.centre == -INFINITY ? F(0) : a.centre - M,
          e = a.target_centre == -INFINITY ? F(0) : a.target_centre - U;
  const F k = std::exp(d), target_k = std::exp(e);
  const F weight = of_target ? a.target_sum : a.sum, factor = of_target ? target_k : k, by = of_target ? e - d : d - e;
  const F tilt = factor == 0 || weight == 0 ? F(0) : factor * (a.tilt + by * weight);
  return {M, k * a.sum, U, target_k * a.target_sum, tilt};
}

template <class F>
FASTLOSS_HD inline PairState<F> merge(const PairState<F>& a, const PairState<F>& c, bool of_target) {
  const F M = a.centre > c.centre ? a.centre : c.centre;
  const F U = a.target_centre > c.target_centre ? a.target_centre : c.target_centre;
  const PairState<F> x = recentre(a, M, U, of_target), y = recentre(c, M, U, of_target);
  return {M, x.sum + y.sum, U, x.target_sum + y.target_sum, x.tilt + y.tilt};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
