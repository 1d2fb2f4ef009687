// Loops over one tile of logits and of target logits, both in buffers of F padded with -inf to whole vectors.
#pragma once

#include <cfloat>

#include "tiles.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// A tile's logits and target logits, the largest of either, and what multiplies them.
template <class F>
struct PairTile {
  const F *z, *u;
  F top, target_top, scale, target_scale;
};

template <class F>
struct PairSums {
  double sum, target_sum, tilt;  // see PairState
};

// Sums about the tile's largest; leaves the logits' exponentials in a, and in b the target's, or (reverse KL) r.
template <Objective kObjective, class F>
inline PairSums<F> pair_tile(const PairTile<F>& tile, int64_t n, F* a, F* b) {
  constexpr int L = kLanes<F>;
  const Centre<F> centre(0, tile.scale), target_centre(0, tile.target_scale);
  const Vec<F> zero = {};
  Vec<F> sum[2] = {}, target_sum[2] = {}, tilt[2] = {};
  const auto step = [&](int64_t i, int k) {
    const Vec<F> z = load(tile.z + i) - tile.top, u = load(tile.u + i) - tile.target_top;
    const Vec<F> e = centre.exp(centre.split(z)), f = target_centre.exp(target_centre.split(u));
    sum[k] += e;
    target_sum[k] += f;
    store(a + i, e);
    if constexpr (kObjective == Objective::kReverseKL) {
      const Vec<F> r = e > 0 ? z * tile.scale - u * tile.target_scale : zero;
      tilt[k] += e * r;
      store(b + i, r);
    } else {
      if constexpr (kObjective == Objective::kForwardKL)
        tilt[k] += f > 0 ? f * (u * tile.target_scale - z * tile.scale) : zero;
      store(b + i, f);
    }
  };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) step(i, 0), step(i + L, 1);
  if (i < n) step(i, 0);
  return {wide_sum<F>(sum[0]) + wide_sum<F>(sum[1]), wide_sum<F>(target_sum[0]) + wide_sum<F>(target_sum[1]),
          wide_sum<F>(tilt[0]) + wide_sum<F>(tilt[1])};
}

// log(p / m) as line - excess. Where the quotient is near one (k = 0), both are of y = (p - m) / m, which keeps what it
// has lost.
template <class F>
struct LogQuotient {
  Vec<F> line, excess;
  Int<F> k;
};
template <class F>
inline LogQuotient<F> log_quotient(Vec<F> quotient, Vec<F> y) {
  constexpr F kLog2 = F(0.69314718055994530942);
  const Binary<F> q = binary<F>(quotient);
  const Vec<F> f = q.k == 0 ? y : q.f;
  return {__builtin_convertvector(q.k, Vec<F>) * kLog2 + f, excess<F>(f), q.k};
}

// From exponentials to p (in a) and p log(p / m) (in b), and the sums of a Mixture.
template <class F>
inline Mixture<double> mixture_tile(F* a, F* b, int64_t n, F k, F target_k, F beta, F rest) {
  const Vec<F> least = broadcast(sizeof(F) == 4 ? F(FLT_MIN) : F(DBL_MIN)), zero = {};  // max() keeps a NaN
  Vec<F> divergence = {}, mean = {};
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    const Vec<F> p = load(a + i) * k, q = load(b + i) * target_k, d = q - p, mp = rest * p, mq = beta * q;
    const Vec<F> reciprocal = 1 / max(least, mq + mp), x = d * reciprocal;
    const LogQuotient<F> of_p = log_quotient<F>(p * reciprocal, -beta * x);
    const LogQuotient<F> of_q = log_quotient<F>(q * reciprocal, rest * x);
    const Vec<F> lines = (of_p.k | of_q.k) == 0 ? (beta * rest) * d * x : mp * of_p.line + mq * of_q.line;
    const Vec<F> h = p * (of_p.line - of_p.excess);
    divergence += max(zero, lines - (mp * of_p.excess + mq * of_q.excess));
    mean += h;
    store(a + i, p);
    store(b + i, h);
  }
  return {wide_sum<F>(divergence), wide_sum<F>(mean)};
}

// Coefficients of a tile, which hold what turns exponentials into probabilities. `r` + `residue` is what the tile's own
// r lacks, less its mean: A p + E p r would cancel after both were rounded.
template <class F>
struct PairGradient {
  F A, E, Q, r, residue;
};

template <class F>
inline void pair_gradient_tile(const F* a, const F* b, int64_t n, const PairGradient<F>& g, F* out) {
  const Coefficients<F> c{g.A, g.E, 0, 0, g.Q};
  const Vec<F> zero = {};
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    const Vec<F> p = load(a + i), other = load(b + i);
    store(out + i, g.E == 0 ? epilogue(c, p, zero, zero, other)
                            : epilogue(c, p, p > 0 ? (other + g.r) + g.residue : zero, zero, zero));
  }
}

// The softcap's derivative, but for its linear part.
template <class F>
inline void bend_tile(F* dx, const F* z, int64_t n, F cap) {
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    const Vec<F> ratio = load(z + i) / cap;
    store(dx + i, load(dx + i) * (1 - ratio * ratio));
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
