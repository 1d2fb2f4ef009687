// Loops over one tile: a few kilobytes of one row, in L1, as F (float or double), padded to whole vectors.
// z is the tile, m the row's running maximum, `scale` multiplies z - m (logit_scale, when no softcap was applied).
#pragma once

#include <cmath>

#include "../row_loss.h"
#include "simd.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

constexpr int64_t kTile = 2048;

template <class F>
inline int64_t padded(int64_t n) {
  return (n + kLanes<F> - 1) / kLanes<F> * kLanes<F>;
}

// Fills buf[0, padded(n)) from n elements of any dtype; the padding gets `fill`.
template <class F>
inline void read_tile(const void* src, DType dtype, int64_t n, F fill, F* buf) {
  visit<F>(dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Storage;
    const T* p = static_cast<const T*>(src);
    int64_t i = 0;
    for (; i + kLanes<F> <= n; i += kLanes<F>) store(buf + i, E::get(p + i));
    if (i == n) return;
    T tail[kLanes<F>] = {};
    std::memcpy(tail, p + i, size_t(n - i) * sizeof(T));
    store(buf + i, E::get(tail));
    for (int64_t j = n; j < padded<F>(n); ++j) buf[j] = fill;
  });
}

// Writes n elements; `streaming` bypasses the caches over the part of dst aligned to its cache lines.
template <class F>
inline void write_tile(const F* g, void* dst, DType dtype, int64_t n, bool streaming) {
  visit<F>(dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Storage;
    constexpr int kBytes = kLanes<F> * int(sizeof(T));
    T* p = static_cast<T*>(dst);
    const auto put = [&](int64_t i, int64_t count) {  // fewer lanes than a vector
      F in[kLanes<F>] = {};
      std::memcpy(in, g + i, size_t(count) * sizeof(F));
      const auto v = E::put(load(in));
      std::memcpy(p + i, &v, size_t(count) * sizeof(T));
    };
    int64_t i = 0;
    if (streaming && n >= kLanes<F>) {
      const int64_t head = (-reinterpret_cast<uintptr_t>(p) % kBytes) / sizeof(T);
      if (head) put(0, head);
      for (i = head; i + kLanes<F> <= n; i += kLanes<F>) stream(p + i, E::put(load(g + i)));
    } else {
      for (; i + kLanes<F> <= n; i += kLanes<F>) store(p + i, E::put(load(g + i)));
    }
    if (i < n) put(i, n - i);
  });
}

// z = cap tanh(logit_scale x / cap), in place.
template <class F>
inline void softcap_tile(F* z, int64_t n, F cap, F logit_scale) {
  const F inner = logit_scale / cap;
  for (int64_t i = 0; i < n; i += kLanes<F>) store(z + i, cap * tanh<F>(load(z + i) * inner));
}

template <class F>
inline F tile_max(const F* z, int64_t n) {
  constexpr int L = kLanes<F>;
  Vec<F> m[4];
  for (auto& v : m) v = broadcast<F>(-INFINITY);
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) m[k] = max(load(z + i + k * L), m[k]);
  for (; i < n; i += L) m[0] = max(load(z + i), m[0]);
  return max_lanes<F>(max(max(m[0], m[1]), max(m[2], m[3])));
}

// sum e^(scale (z - m)), and with Moment sum e^(..) scale (z - m). The exponentials are kept in e unless it is null.
template <bool Moment, class F>
inline void tile_exp(const F* z, int64_t n, F m, F scale, F* e, RowState<double>& state) {
  constexpr int L = kLanes<F>;
  Vec<F> sum[2] = {}, moment = {};
  const F rate = scale * F(kLog2E);
  const auto step = [&](int64_t i, Vec<F>& s) {
    const Vec<F> d = load(z + i) - m;
    const Vec<F> v = exp2<F>(d * rate);
    s += v;
    if constexpr (Moment) moment += v > 0 ? v * d : Vec<F>{};
    if (e) store(e + i, v);
  };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) step(i, sum[0]), step(i + L, sum[1]);
  if (i < n) step(i, sum[0]);
  state.sum = sum_lanes<F>(sum[0]) + double(sum_lanes<F>(sum[1]));
  state.moment = Moment ? sum_lanes<F>(moment) * double(scale) : 0;
}

// The weights of a tile: an array, or one everywhere (zero in the padding).
template <class F>
struct TileWeights {
  const F* w;
  int64_t n;
  Vec<F> at(int64_t i) const {
    if (w) return load(w + i);
    Vec<F> one = broadcast<F>(1);
    for (int64_t k = n - i; k < kLanes<F>; ++k) one[k] = 0;
    return one;
  }
};

// sum w scale (z - m) and sum w.
template <class F>
inline void tile_plain(const F* z, int64_t n, F m, F scale, TileWeights<F> weights, RowState<double>& state) {
  Vec<F> plain = {}, mass = {};
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    const Vec<F> w = weights.at(i);
    plain += w == 0 ? Vec<F>{} : w * (load(z + i) - m);
    mass += w;
  }
  state.plain = sum_lanes<F>(plain) * double(scale);
  state.mass = sum_lanes<F>(mass);
}

// q' = w ((1 - eps) q + eps / V): the smoothed, weighted class probabilities, in place.
template <class F>
inline void smooth_probs_tile(F* q, int64_t n, const F* w, F eps, int64_t V) {
  if (eps == 0 && !w) return;
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    Vec<F> v = load(q + i) * (1 - eps) + eps / F(V);
    if (w) v *= load(w + i);
    store(q + i, v);
  }
}

// One tile of the gradient, without the target's own entry. `in` holds exponentials that `k` turns into probabilities
// (ExpKept), or z / scale, from which they are computed; cap > 0 multiplies by phi' = 1 - (z / cap)^2. Here m is the
// maximum of z itself, scale included: z - m in one fused operation.
template <bool ExpKept, class F>
inline void gradient_tile(const F* in, F* out, int64_t n, F m, F scale, F k, const Coefficients<F>& c, const F* w,
                          const F* q, F cap) {
  constexpr int L = kLanes<F>;
  if (ExpKept && c.C == 0 && c.Q == 0) {  // plain cross-entropy: one multiplication
    const F Ak = c.A * k;
    for (int64_t i = 0; i < n; i += L) store(out + i, load(in + i) * Ak);
    return;
  }
  const Vec<F> one = broadcast<F>(1), zero = {};
  for (int64_t i = 0; i < n; i += L) {
    const Vec<F> z = load(in + i), d = z * scale - m;
    const Vec<F> p = (ExpKept ? z : exp2<F>(d * F(kLog2E))) * k;
    const Vec<F> r = ExpKept || c.E == 0 ? zero : (p > 0 ? d : zero);
    Vec<F> dx = epilogue(c, p, r, w ? load(w + i) : one, q ? load(q + i) : zero);
    if (cap > 0) dx *= 1 - (z / cap) * (z / cap);
    store(out + i, dx);
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
