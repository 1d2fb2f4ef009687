// Element types of logits, probabilities and gradients: how sixteen bytes become numbers of the compute type and back.
#pragma once

#include "../view.h"
#include "device.cuh"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// The types whose elements are numbers of the compute type.
template <class T>
struct Whole {
  using Storage = T;
  using Compute = T;
  using Chunk = fastloss::Chunk<T>;
  static constexpr int kCount = Chunk::kSize;

  static FASTLOSS_DEVICE T get(T x) { return x; }
  static FASTLOSS_DEVICE T put(T x) { return x; }
  static FASTLOSS_DEVICE void unpack(const Chunk& c, T (&v)[kCount]) {
    for (int i = 0; i < kCount; ++i) v[i] = c.v[i];
  }
  static FASTLOSS_DEVICE Chunk pack(const T (&v)[kCount]) {
    Chunk c;
    for (int i = 0; i < kCount; ++i) c.v[i] = v[i];
    return c;
  }
  // The largest of several chunks' elements; NaN counts for nothing.
  template <int kChunks>
  static FASTLOSS_DEVICE T top(const Chunk (&c)[kChunks]) {
    T m = c[0].v[0];
    for (int k = 0; k < kChunks; ++k)
      for (int i = k ? 0 : 1; i < kCount; ++i) m = larger(m, c[k].v[i]);
    return m;
  }
  // Sixteen bytes that begin `shift` bits after those of w[0]; w[0..4] are read.
  static FASTLOSS_DEVICE Chunk shifted(const uint32_t* w, int) {
    Chunk c;
    memcpy(&c, w, sizeof c);
    return c;
  }
};
using Float32 = Whole<float>;
using Float64 = Whole<double>;

// The two sixteen-bit types; Half says how two of them are compared, read and written.
template <class Half>
struct Sixteen {
  using Storage = uint16_t;
  using Compute = float;
  using Chunk = fastloss::Chunk<uint32_t>;  // pairs
  static constexpr int kCount = 8;

  static FASTLOSS_DEVICE float get(uint16_t x) { return Half::low(x); }
  static FASTLOSS_DEVICE uint16_t put(float x) { return uint16_t(Half::pair(x, x)); }
  static FASTLOSS_DEVICE void unpack(const Chunk& c, float (&v)[kCount]) {
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = Half::low(c.v[i]);
      v[2 * i + 1] = Half::high(c.v[i]);
    }
  }
  static FASTLOSS_DEVICE Chunk pack(const float (&v)[kCount]) {
    Chunk c;
    for (int i = 0; i < 4; ++i) c.v[i] = Half::pair(v[2 * i], v[2 * i + 1]);
    return c;
  }
  template <int kChunks>
  static FASTLOSS_DEVICE float top(const Chunk (&c)[kChunks]) {
    uint32_t m = c[0].v[0];
    for (int k = 0; k < kChunks; ++k)
      for (int i = k ? 0 : 1; i < 4; ++i) m = Half::max(m, c[k].v[i]);
    return larger(Half::low(m), Half::high(m));
  }
  static FASTLOSS_DEVICE Chunk shifted(const uint32_t* w, int shift) {
    Chunk c;
    for (int i = 0; i < 4; ++i) c.v[i] = funnel_right(w[i], w[i + 1], shift);
    return c;
  }
};

struct BFloat16Pair {
  static FASTLOSS_DEVICE float low(uint32_t w) { return low_bfloat16(w); }
  static FASTLOSS_DEVICE float high(uint32_t w) { return high_bfloat16(w); }
  static FASTLOSS_DEVICE uint32_t pair(float low, float high) { return to_bfloat16x2(low, high); }
  static FASTLOSS_DEVICE uint32_t max(uint32_t a, uint32_t b) { return max_bfloat16x2(a, b); }
};
using BFloat16 = Sixteen<BFloat16Pair>;

struct Float16Pair {
  static FASTLOSS_DEVICE float low(uint32_t w) { return from_float16(uint16_t(w)); }
  static FASTLOSS_DEVICE float high(uint32_t w) { return from_float16(uint16_t(w >> 16)); }
  static FASTLOSS_DEVICE uint32_t pair(float low, float high) { return to_float16x2(low, high); }
  static FASTLOSS_DEVICE uint32_t max(uint32_t a, uint32_t b) { return max_float16x2(a, b); }
};
using Float16 = Sixteen<Float16Pair>;

// Element j of a row in a dtype known only at run time, in the compute type.
template <class F>
FASTLOSS_DEVICE F element(const void* row, DType dtype, int64_t j) {
  switch (dtype) {
    case DType::kFloat64:
      return F(static_cast<const double*>(row)[j]);
    case DType::kBFloat16:
      return F(BFloat16::get(static_cast<const uint16_t*>(row)[j]));
    case DType::kFloat16:
      return F(Float16::get(static_cast<const uint16_t*>(row)[j]));
    default:
      return F(static_cast<const float*>(row)[j]);
  }
}

// Minus infinity, in all elements of a chunk.
template <class E>
FASTLOSS_DEVICE typename E::Chunk nothing() {
  typename E::Compute v[E::kCount];
  for (auto& x : v) x = -INFINITY;
  return E::pack(v);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
