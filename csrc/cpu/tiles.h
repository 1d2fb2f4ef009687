// Loops over one tile: a few thousand columns of one row. A tile comes either straight from memory, in the dtype of the
// logits (E), in whole vectors; or from a buffer of F (float or double), padded to whole vectors.
#pragma once

#include "../row_loss.h"
#include "simd.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

constexpr int64_t kTile = 2048;
// The hardware's prefetcher stops at every page and a row of float16 outruns it: ask this many bytes ahead.
constexpr int kAhead = 4096;

template <class F>
inline int64_t padded(int64_t n) {
  return (n + kLanes<F> - 1) / kLanes<F> * kLanes<F>;
}

// Asks for what is kAhead bytes after the `count` elements at p.
template <class T>
inline void prefetch_after(const T* p, int count) {
  for (int b = 0; b < count * int(sizeof(T)); b += 64) prefetch(reinterpret_cast<const char*>(p) + kAhead + b);
}

// Fills buf from n elements of any dtype, in whole vectors: pad_tile comes after whatever else is done to the tile.
template <class F>
inline void read_tile(const void* src, DType dtype, int64_t n, F* buf) {
  visit<F>(dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Storage;
    const T* p = static_cast<const T*>(src);
    int64_t i = 0;
    for (; i + kLanes<F> <= n; i += kLanes<F>) {
      prefetch_after(p + i, kLanes<F>);
      store(buf + i, E::get(p + i));
    }
    if (i == n) return;
    T tail[kLanes<F>] = {};
    std::memcpy(tail, p + i, size_t(n - i) * sizeof(T));
    store(buf + i, E::get(tail));
  });
}

template <class F>
inline void pad_tile(F* buf, int64_t n, F fill) {
  for (int64_t j = n; j < padded<F>(n); ++j) buf[j] = fill;
}

// Writes n elements k g; `streaming` bypasses the caches over the part of dst aligned to its vectors.
template <class F>
inline void write_tile(const F* g, F k, void* dst, DType dtype, int64_t n, bool streaming) {
  visit<F>(dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Storage;
    constexpr int kBytes = E::kPacked * int(sizeof(T));
    T* p = static_cast<T*>(dst);
    const auto put = [&](int64_t i, int64_t count) {  // fewer lanes than a vector
      F in[E::kPacked] = {};
      std::memcpy(in, g + i, size_t(count) * sizeof(F));
      const auto v = E::pack(in, k);
      std::memcpy(p + i, &v, size_t(count) * sizeof(T));
    };
    int64_t i = 0;
    if (streaming && n >= E::kPacked) {
      const int64_t head = int64_t((-reinterpret_cast<uintptr_t>(p) % kBytes) / sizeof(T));
      if (head) put(0, head);
      for (i = head; i + E::kPacked <= n; i += E::kPacked) stream(p + i, E::pack(g + i, k));
    } else {
      for (; i + E::kPacked <= n; i += E::kPacked) store(p + i, E::pack(g + i, k));
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
inline void subtract_tile(F* z, int64_t n, F m) {
  for (int64_t i = 0; i < n; i += kLanes<F>) store(z + i, load(z + i) - m);
}

template <class E, class F, class T>
inline F tile_max(const T* z, int64_t n) {
  constexpr int L = kLanes<F>;
  Vec<F> m[4];
  for (auto& v : m) v = broadcast<F>(-INFINITY);
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) m[k] = max(E::get(z + i + k * L), m[k]);
  for (; i < n; i += L) m[0] = max(E::get(z + i), m[0]);
  return max_lanes<F>(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <class F>
struct ExpSums {
  F max;          // of z
  double sum;     // sum e^(scale z - centre)
  double moment;  // sum e^(..) (scale z - centre)
};

// The exponentials of a tile around a centre, kept in e if Keep, and their sums.
template <bool Moment, bool Keep, class E, class F, class T>
inline ExpSums<F> tile_exp(const T* z, int64_t n, const Centre<F>& centre, F* e) {
  constexpr int L = kLanes<F>;
  Vec<F> sum[2] = {}, moment = {}, top[2] = {broadcast<F>(-INFINITY), broadcast<F>(-INFINITY)};
  const auto step = [&](int64_t i, int k) {
    const Vec<F> v = E::get(z + i);
    const auto parts = centre.split(v);
    const Vec<F> x = centre.exp(parts);
    top[k] = max(v, top[k]);
    sum[k] += x;
    if constexpr (Moment) moment += x * centre.log2(parts);
    if constexpr (Keep) store(e + i, x);
  };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    prefetch_after(z + i, 2 * L);
    step(i, 0), step(i + L, 1);
  }
  if (i < n) step(i, 0);
  return {max_lanes<F>(max(top[0], top[1])), sum_lanes<F>(sum[0]) + double(sum_lanes<F>(sum[1])),
          sum_lanes<F>(moment) / kLog2E};
}

// The weights of a tile of n columns: an array padded with zeros, or one everywhere.
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

template <class F>
struct PlainSums {
  double plain, mass;  // sum w (scale z - m) and sum w
};

template <class E, class F, class T>
inline PlainSums<F> tile_plain(const T* z, int64_t n, F m, F scale, TileWeights<F> weights) {
  constexpr int L = kLanes<F>, kSums = 4;  // rounding errors of equal numbers add up, the fewer to a sum the better
  Vec<F> plain[kSums] = {}, mass[kSums] = {};
  const auto step = [&](int64_t i, int k) {
    if (weights.w) prefetch_after(weights.w + i, L);
    const Vec<F> w = weights.at(i);
    plain[k] += w == 0 ? Vec<F>{} : w * (E::get(z + i) * scale - m);
    mass[k] += w;
  };
  int64_t i = 0;
  for (; i + kSums * L <= n; i += kSums * L)
    for (int k = 0; k < kSums; ++k) step(i + k * L, k);
  for (; i < n; i += L) step(i, 0);
  return {sum_lanes<F>((plain[0] + plain[1]) + (plain[2] + plain[3])),
          sum_lanes<F>((mass[0] + mass[1]) + (mass[2] + mass[3]))};
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

// The column of the first z equal to top.
template <class E, class F, class T>
inline int64_t first_equal(const T* z, int64_t n, F top) {
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    F lanes[kLanes<F>];
    store(lanes, E::get(z + i));
    for (int64_t k = 0; k < kLanes<F> && i + k < n; ++k)
      if (lanes[k] == top) return i + k;
  }
  return 0;
}

// How many z are larger than x.
template <class F>
inline int64_t count_above(const F* z, int64_t n, F x) {
  Int<F> count = {};
  for (int64_t i = 0; i < n; i += kLanes<F>) count -= load(z + i) > broadcast<F>(x);
  int64_t sum = 0;
  for (int k = 0; k < kLanes<F>; ++k) sum += count[k];
  return sum;
}

// What a tile of the gradient may need besides the probabilities.
template <class F>
struct Operands {
  const F* w;  // class weights, or null: one
  const F* q;  // smoothed class probabilities, or null: zero
  F m, scale;  // r = scale z - m
  F cap;       // > 0: phi' = 1 - (z / cap)^2, z before `shift` was taken away
  F shift;
};

// One tile of the gradient, without the target's own entry. With ExpKept z holds exponentials already; k turns
// exponentials into probabilities.
template <bool ExpKept, class E, class F, class T>
inline void gradient_tile(const T* z, F* out, int64_t n, const Centre<F>& centre, F k, const Coefficients<F>& c,
                          const Operands<F>& o) {
  const Vec<F> one = broadcast<F>(1), zero = {};
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    const Vec<F> v = E::get(z + i);
    const Vec<F> p = (ExpKept ? v : centre.exp(centre.split(v))) * k;
    const Vec<F> r = ExpKept || c.E == 0 ? zero : (p > 0 ? v * o.scale - o.m : zero);
    Vec<F> dx = epilogue(c, p, r, o.w ? load(o.w + i) : one, o.q ? load(o.q + i) : zero);
    if (o.cap > 0) {
      const Vec<F> ratio = (v + o.shift) / o.cap;
      dx *= 1 - ratio * ratio;
    }
    store(out + i, dx);
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
