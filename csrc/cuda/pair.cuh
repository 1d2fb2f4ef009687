// Rows of logits beside rows of target logits: the sums of a slice of both, and its gradient. Both are read once into
// shared memory; a mixture's divergences (JS) take a second round over it, which knows the sums of all.
#pragma once

#include "gradient.cuh"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// A slice of either row.
template <class E>
struct PairSlices {
  using Chunk = typename E::Chunk;
  Slice<E> x, u;

  FASTLOSS_DEVICE PairSlices(const Rows& rows, const Place& at, const Cut& cut, unsigned char* memory)
      : x(rows.input.row(at.row), at.begin, at.end, memory),
        u(rows.teacher.row(at.row), at.begin, at.end, memory + slice_bytes(cut.columns, sizeof(typename E::Storage))) {}

  FASTLOSS_DEVICE void load() const {
    x.load();
    u.load();
    if (threadIdx.x == 0) u.staged()[u.chunks()] = nothing<E>();  // the logits' chunks may reach beyond its last
    copy_async_wait<0>();
    __syncthreads();
  }

  // fn(chunk of logits, of target logits, the first's column) over this thread's groups.
  template <class Fn>
  FASTLOSS_DEVICE void for_groups(Fn&& fn) const {
#pragma unroll 1
    for (int g = int(threadIdx.x); g < x.groups(); g += int(blockDim.x))
      fn(x.elements(g * E::kCount), u.elements(g * E::kCount), g * E::kCount);
  }
};

// What every column of a row needs: both rows' scales, and once they are known their centres and sums.
template <class F>
struct PairColumns {
  Columns<F> logits;
  Objective objective;
  F target_scale, beta, rest;                            // rest: 1 - beta
  F centre = 0, k = 0, target_centre = 0, target_k = 0;  // probabilities are k e^(z - centre)

  FASTLOSS_DEVICE PairColumns(const Rows& rows, const Place& at)
      : logits(rows, at.row, at.begin),
        objective(rows.spec.objective),
        target_scale(F(rows.spec.target_scale)),
        beta(F(rows.spec.beta)),
        rest(F(1 - rows.spec.beta)) {}

  FASTLOSS_DEVICE bool of_target() const { return objective == Objective::kForwardKL; }
  FASTLOSS_DEVICE void know(const PairStats<F>& s) {
    centre = s.centre, k = std::exp(-s.log_sum);
    target_centre = s.target_centre, target_k = std::exp(-s.target_log_sum);
  }
  // From logits (bent) and target logits to their exponents about the centres.
  template <int K>
  FASTLOSS_DEVICE void exponents(F (&z)[K], F (&u)[K]) const {
    differences(z, logits.scale, centre);
    differences(u, target_scale, target_centre);
  }
  template <int K>
  FASTLOSS_DEVICE void bend_all(F (&x)[K]) const {
    if (logits.cap > 0)
      for (F& v : x) v = logits.bent(v);
  }

 private:
  template <int K>
  static FASTLOSS_DEVICE void differences(F (&x)[K], F scale, F M) {
    if ((M < 0 ? -M : M) < F(kNear))
      for (F& v : x) v = fused(v, scale, -M);
    else
      for (F& v : x) v = product(v, scale) - M;
  }
};

template <class F, int K>
FASTLOSS_DEVICE F largest(const F (&x)[K]) {
  F m = x[0];
  for (int i = 1; i < K; ++i) m = larger(m, x[i]);
  return m;
}

// The state of one thread's columns.
template <class E, class F = typename E::Compute>
FASTLOSS_DEVICE PairState<F> sum_up(const PairSlices<E>& slices, PairColumns<F> columns) {
  PairState<F> s;
  slices.for_groups([&](const typename E::Chunk& in, const typename E::Chunk& target, int first) {
    constexpr int K = E::kCount;
    F z[K], u[K];
    E::unpack(in, z);
    E::unpack(target, u);
    columns.bend_all(z);
    if (first + K > slices.x.count)
      for (int i = 0; i < K; ++i)
        if (first + i >= slices.x.count) z[i] = u[i] = -INFINITY;
    const F M = larger(s.centre, product(largest(z), columns.logits.scale));
    const F U = larger(s.target_centre, product(largest(u), columns.target_scale));
    if (M != s.centre || U != s.target_centre) s = recentre(s, M, U, columns.of_target());
    columns.centre = M == -INFINITY ? F(0) : M, columns.target_centre = U == -INFINITY ? F(0) : U;
    columns.exponents(z, u);
    for (int i = 0; i < K; ++i) {
      const F e = exponential(z[i]), f = exponential(u[i]);
      s.sum += e;
      s.target_sum += f;
      // Of the exponents' difference, in the expectation's own direction.
      if (columns.of_target())
        s.tilt += f > 0 ? f * (u[i] - z[i]) : F(0);
      else
        s.tilt += e > 0 ? e * (z[i] - u[i]) : F(0);
    }
  });
  return s;
}

// log(p / m) as line - excess: near one both are of y = (p - m) / m, which keeps what the quotient has lost.
template <class F>
struct LogQuotient {
  F line, excess;
  bool near;
};
template <class F>
FASTLOSS_DEVICE LogQuotient<F> log_quotient(F ratio, F y) {
  const bool near = ratio > F(0.7072) && ratio < F(1.4142);
  const F least = -4 / Limits<F>::kLowest;
  return {near ? y : F(std::log(ratio < least ? least : ratio)), near ? excess<F>(y) : F(0), near};
}

// One column of a Mixture, and p log(p / m).
template <class F>
struct Mixed {
  F divergence, h;
};
template <class F>
FASTLOSS_DEVICE Mixed<F> mixed(F p, F q, F beta, F rest) {
  const F least = -8 / Limits<F>::kLowest;  // of a vanishing m
  const F d = q - p, mp = rest * p, mq = beta * q, m = mq + mp;
  const F reciprocal = quotient(F(1), m < least ? least : m), x = d * reciprocal;
  const LogQuotient<F> of_p = log_quotient(p * reciprocal, -beta * x), of_q = log_quotient(q * reciprocal, rest * x);
  const F lines = of_p.near && of_q.near ? beta * rest * d * x : mp * of_p.line + mq * of_q.line;
  const F divergence = lines - (mp * of_p.excess + mq * of_q.excess);
  return {divergence < 0 ? F(0) : divergence, p * (of_p.line - of_p.excess)};
}

template <class E, class F = typename E::Compute>
FASTLOSS_DEVICE Mixture<F> mix(const PairSlices<E>& slices, const PairColumns<F>& columns) {
  Mixture<F> sums;
  slices.for_groups([&](const typename E::Chunk& in, const typename E::Chunk& target, int first) {
    F x[E::kCount], u[E::kCount];
    E::unpack(in, x);
    E::unpack(target, u);
    columns.bend_all(x);
    columns.exponents(x, u);
    for (int i = 0; i < E::kCount && first + i < slices.x.count; ++i) {
      const Mixed<F> one =
          mixed(columns.k * exponential(x[i]), columns.target_k * exponential(u[i]), columns.beta, columns.rest);
      sums.divergence += one.divergence;
      sums.mean += one.h;
    }
  });
  return sums;
}

// The gradient of a slice, from both rows in shared memory.
template <class E, class F = typename E::Compute>
FASTLOSS_DEVICE void write_gradient(const PairSlices<E>& slices, const Destination<E>& to, const Coefficients<F>& c,
                                    const PairColumns<F>& columns) {
  // Chunks may reach beyond the slice; what is computed there is not written.
  for_chunks<Source::kShared, 1>(slices.x, to, [&](const typename E::Chunk& in, int column) {
    constexpr int K = E::kCount;
    F z[K], dx[K], u[K];
    E::unpack(in, z);
    E::unpack(slices.u.elements(column), u);
    columns.bend_all(z);
    for (int i = 0; i < K; ++i) dx[i] = z[i];
    columns.exponents(dx, u);
    for (int i = 0; i < K; ++i) {
      const F a = dx[i], p = columns.k * exponential(a);
      if (columns.objective == Objective::kReverseKL) {
        dx[i] = epilogue(c, p, p > 0 ? a - u[i] : F(0), F(0), F(0));
        continue;
      }
      const F q = columns.target_k * exponential(u[i]);
      dx[i] = epilogue(c, p, F(0), F(0), columns.of_target() ? q : mixed(p, q, columns.beta, columns.rest).h);
    }
    if (columns.logits.cap > 0)
      for (int i = 0; i < K; ++i) dx[i] *= bend(z[i], columns.logits.cap);
    return E::pack(dx);
  });
}

// ---- one out of many ------------------------------------------------------------------------------------------------

template <class F>
FASTLOSS_DEVICE PairState<F> of_lane(const PairState<F>& s, int d) {
  const auto there = [=](F v) { return __shfl_xor_sync(kAllLanes, v, d); };
  return {there(s.centre), there(s.sum), there(s.target_centre), there(s.target_sum), there(s.tilt)};
}
template <class F>
FASTLOSS_DEVICE Mixture<F> of_lane(const Mixture<F>& m, int d) {
  return {__shfl_xor_sync(kAllLanes, m.divergence, d), __shfl_xor_sync(kAllLanes, m.mean, d)};
}

// In shared memory.
template <class T>
struct Meeting {
  T warps[kWarp];
  T block, all;
};

// A block's or a cluster's values merged; every thread knows the result. No block may end before all have read:
// cluster_sync().
template <class T, class Merge>
FASTLOSS_DEVICE T meet(T v, Meeting<T>& at, int blocks, Merge&& merge) {
  const auto join = [&](T mine) {
    for (int d = kWarp / 2; d; d /= 2) mine = merge(mine, of_lane(mine, d));
    return mine;
  };
  v = join(v);
  if (lane_id() == 0) at.warps[warp_id()] = v;
  __syncthreads();
  if (warp_id() == 0) {
    v = join(lane_id() < int(blockDim.x) / kWarp ? at.warps[lane_id()] : T{});
    if (lane_id() == 0) at.block = v;
  }
  if (blocks > 1) {
    cluster_sync();
    if (warp_id() == 0) v = join(lane_id() < blocks ? *cluster_map(&at.block, unsigned(lane_id())) : T{});
  }
  if (threadIdx.x == 0) at.all = v;
  __syncthreads();
  return at.all;
}

template <class F>
FASTLOSS_DEVICE PairState<F> meet(const PairState<F>& s, Meeting<PairState<F>>& at, int blocks, bool of_target) {
  return meet(s, at, blocks, [=](const PairState<F>& a, const PairState<F>& b) { return merge(a, b, of_target); });
}
template <class F>
FASTLOSS_DEVICE Mixture<F> meet(const Mixture<F>& m, Meeting<Mixture<F>>& at, int blocks) {
  return meet(m, at, blocks, [](const Mixture<F>& a, const Mixture<F>& b) -> Mixture<F> {
    return {a.divergence + b.divergence, a.mean + b.mean};
  });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
