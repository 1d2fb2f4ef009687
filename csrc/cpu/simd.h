// One SIMD vector per instruction set, through the compiler's vector extensions: arithmetic, comparisons and selects
// are plain operators, so this one source is AVX-512, AVX2, SSE2 and NEON. Intrinsics appear only where no operator
// exists.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../view.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class F>
struct SimdTypes;
template <>
struct SimdTypes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct SimdTypes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct SimdTypes<uint32_t> {
  typedef uint32_t Vec __attribute__((vector_size(kVectorBytes)));
};
template <class F>
using Vec = typename SimdTypes<F>::Vec;
template <class F>
using Int = typename SimdTypes<F>::Int;
template <class F>
constexpr int kLanes = kVectorBytes / int(sizeof(F));

// 16-bit floats travel as bits: one per float lane, or a whole vector of them for two vectors of floats.
typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
using Bits = Vec<uint32_t>;

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class F>
inline Vec<F> load(const F* p) {
  return load_as<Vec<F>>(p);
}
template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class F>
inline Vec<F> broadcast(F x) {
  return x - Vec<F>{};
}

// The larger lanes; b where either is NaN. (GCC makes a comparison and a blend of the operator form.)
#if defined(__AVX512F__)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
#elif defined(__SSE2__)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm_max_ps((__m128)a, (__m128)b); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm_max_pd((__m128d)a, (__m128d)b); }
#else
template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}
#endif

template <class F>
inline F sum_lanes(Vec<F> v) {
  F s = 0;
  for (int i = 0; i < kLanes<F>; ++i) s += v[i];
  return s;
}
// In double: for sums that will be divided by each other, and subtracted.
template <class F>
inline double wide_sum(Vec<F> v) {
  double s = 0;
  for (int i = 0; i < kLanes<F>; ++i) s += double(v[i]);
  return s;
}
template <class F>
inline F max_lanes(Vec<F> v) {
  F m = v[0];
  for (int i = 1; i < kLanes<F>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// A store that bypasses the caches, for memory that is not read soon; p is aligned to the vector.
inline void stream(float* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
inline void stream(double* p, Vec<double> v) { stream(reinterpret_cast<float*>(p), (Vec<float>)v); }
inline void stream(uint16_t* p, Halves v) { stream(reinterpret_cast<float*>(p), (Vec<float>)v); }
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- conversions ---------------------------------------------------------------------------------------------------

inline Bits widen(Half h) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Bits);
#endif
}

inline Vec<float> from_bfloat16(Half h) { return (Vec<float>)(widen(h) << 16); }

inline Halves join(Half low, Half high) {
#if defined(__AVX512F__)
  return (Halves)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
#elif defined(__AVX2__)
  return (Halves)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)low), (__m128i)high, 1);
#else
  typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
  return (Halves)Words{(uint64_t)low, (uint64_t)high};
#endif
}

// Of two vectors of lanes below 2^16.
inline Halves narrow(Bits low, Bits high) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // packs within 128-bit lanes; GCC would do either vector alone
  return (Halves)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)low, (__m256i)high), 0xd8);
#else
  return join(__builtin_convertvector(low, Half), __builtin_convertvector(high, Half));
#endif
}

inline Bits bfloat16_bits(Vec<float> v) {
  const Bits bits = (Bits)v;
  const Bits nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v != v ? Bits{} + 0x7fc0u : nearest_even;
}

inline Halves to_bfloat16(Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  return join((Half)_mm512_cvtneps_pbh((__m512)low), (Half)_mm512_cvtneps_pbh((__m512)high));
#else
  return narrow(bfloat16_bits(low), bfloat16_bits(high));
#endif
}

inline Vec<float> from_float16(Half h) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  const Bits wide = widen(h);
  const Bits magnitude = wide & 0x7fffu;
  const Vec<float> finite = (Vec<float>)(magnitude << 13) * 0x1p112f;  // moves the exponent; exact for subnormals too
  const Bits bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : (Bits)finite;
  return (Vec<float>)(bits | ((wide & 0x8000u) << 16));
#endif
}

inline Half to_float16(Vec<float> v) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const Bits bits = (Bits)v, magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;  // 0.5f has the ulp of a float16 subnormal
  Bits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Half);
#endif
}

// Element types: how a vector of compute lanes is read from memory, and what k times kPacked of them are as a vector.
struct Float32 {
  using Storage = float;
  static Vec<float> get(const float* p) { return load(p); }
  static constexpr int kPacked = kLanes<float>;
  static Vec<float> pack(const float* v, float k) { return load(v) * k; }
};
struct Float64 {
  using Storage = double;
  static Vec<double> get(const double* p) { return load(p); }
  static constexpr int kPacked = kLanes<double>;
  static Vec<double> pack(const double* v, double k) { return load(v) * k; }
};
struct BFloat16 {
  using Storage = uint16_t;
  static Vec<float> get(const uint16_t* p) { return from_bfloat16(load_as<Half>(p)); }
  static constexpr int kPacked = 2 * kLanes<float>;
  static Halves pack(const float* v, float k) { return to_bfloat16(load(v) * k, load(v + kLanes<float>) * k); }
};
struct Float16 {
  using Storage = uint16_t;
  static Vec<float> get(const uint16_t* p) { return from_float16(load_as<Half>(p)); }
  static constexpr int kPacked = 2 * kLanes<float>;
  static Halves pack(const float* v, float k) {
    return join(to_float16(load(v) * k), to_float16(load(v + kLanes<float>) * k));
  }
};

// Calls f with the element type that `dtype` names, among those that compute in F.
template <class F, class Fn>
inline auto visit(DType dtype, Fn&& f) {
  if constexpr (sizeof(F) == 8) {
    return f(Float64{});
  } else {
    switch (dtype) {
      case DType::kBFloat16:
        return f(BFloat16{});
      case DType::kFloat16:
        return f(Float16{});
      default:
        return f(Float32{});
    }
  }
}

// ---- exp and tanh --------------------------------------------------------------------------------------------------

constexpr double kLog2E = 1.44269504088896340736;

template <class F>
struct Exp2;
template <>
struct Exp2<float> {  // (2^f - 1) / f on [-1/2, 1/2], relative error of 2^f 2.0e-9 (minimax fit)
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f + kBias;  // adding it leaves round(t) + bias in the low bits
  static constexpr float kPoly[] = {0x1.62e430af276fcp-1f, 0x1.ebfbdc3c2f1f9p-3f,  0x1.c6aee88e0e0cap-5f,
                                    0x1.3b2d4cf2365aep-7f, 0x1.5f3e5336b2764p-10f, 0x1.41fbbc250547bp-13f};
};
template <>
struct Exp2<double> {  // the Taylor series, ln(2)^k / k!, relative error below 1e-17
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52 + kBias;
  static constexpr double kPoly[] = {6.931471805599453094e-01, 2.402265069591007123e-01, 5.550410866482157995e-02,
                                     9.618129107628477162e-03, 1.333355814642844342e-03, 1.540353039338160995e-04,
                                     1.525273380405984028e-05, 1.321548679014430949e-06, 1.017808600923969973e-07,
                                     7.054911620801123330e-09, 4.445538271870811498e-10, 2.567843599348820514e-11,
                                     1.369148885390412888e-12};
};

// 2^f - 1 for f in [-1/2, 1/2].
template <class F>
inline Vec<F> exp2_fraction(Vec<F> f) {
  constexpr int n = sizeof(Exp2<F>::kPoly) / sizeof(F);
  Vec<F> p = broadcast<F>(Exp2<F>::kPoly[n - 1]);
  for (int i = n - 2; i >= 0; --i) p = p * f + Exp2<F>::kPoly[i];
  return p * f;
}
// 2^n from kRound + n; exactly zero for n = -bias.
template <class F>
inline Vec<F> exp2_scale(Vec<F> rounded) {
  return (Vec<F>)((Int<F>)rounded << Exp2<F>::kMantissa);
}

// x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), of a finite x > 0 in the normal range; of any other x something
// finite, or NaN.
template <class F>
struct Binary {
  Int<F> k;
  Vec<F> f;
};
template <class F>
inline Binary<F> binary(Vec<F> x) {
  constexpr int kMantissa = Exp2<F>::kMantissa;
  using Integer = std::conditional_t<sizeof(F) == 4, int32_t, int64_t>;
  constexpr auto kRootHalf = Integer(sizeof(F) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd);
  const Int<F> bits = (Int<F>)x, k = (bits - kRootHalf) >> kMantissa;
  return {k, (Vec<F>)(bits - (k << kMantissa)) - 1};
}

// e^(scale z - value): exponentials of one row around a centre near its maximum. In powers of two the centre is an
// integer M, so that z rate = n + f needs one fused multiply-add for n and one for f, and f keeps all its digits at any
// |z| where M + kRound is exact. Below the normal range, and for z = -inf, the result is exactly zero.
template <class F>
struct Centre {
  F rate, round, floor;
  double value;  // what the exponentials are relative to, in units of scale z
  bool exact;    // false: the row is too far out; subtract its maximum first

  Centre(F max, F scale) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    constexpr bool kFused = true;
#else
    constexpr bool kFused = false;  // z rate would be rounded before n is taken away
#endif
    // In double the centre's own rounding is what would limit the result.
    constexpr double kFar = kFused && sizeof(F) == 4 ? 1 << 20 : 2;
    rate = F(scale * kLog2E);
    const double M = std::nearbyint(double(max) * rate);
    round = F(Exp2<F>::kRound - M);
    floor = F((M - Exp2<F>::kBias) / rate);
    value = M * (double(scale) / rate);
    exact = std::abs(M) <= kFar;
  }

  struct Parts {
    Vec<F> rounded, f;
  };
  Parts split(Vec<F> z) const {
    z = max(broadcast(floor), z);  // keeps a NaN
    const Vec<F> rounded = z * rate + round;
    return {rounded, z * rate - (rounded - round)};
  }
  // t with 2^t the exponential.
  Vec<F> log2(const Parts& p) const { return (p.rounded - Exp2<F>::kRound) + p.f; }
  static Vec<F> exp(const Parts& p) {
    const Vec<F> s = exp2_scale<F>(p.rounded);
    return exp2_fraction<F>(p.f) * s + s;
  }
};

// tanh(x) = m / (m + 2) with m = e^(2x) - 1, which keeps its digits near zero. Large x stop where tanh has long rounded
// to one, or m would overflow; for small ones the exponential ends at zero by itself. Keeps a NaN.
template <class F>
inline Vec<F> tanh(Vec<F> x) {
  const F bound = sizeof(F) == 4 ? 10 : 20;
  const auto p = Centre<F>(0, 2).split(-max(broadcast(-bound), -x));  // min(x, bound)
  const Vec<F> s = exp2_scale<F>(p.rounded);
  const Vec<F> m = exp2_fraction<F>(p.f) * s + (s - 1);
  return m / (m + 2);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
