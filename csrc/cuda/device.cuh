// What a GPU can do and C++ has no words for. Compiled for the host (tests/cuda_on_host.h stands in for the GPU then)
// the same functions are plain C++.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(FASTLOSS_CUDA_ON_HOST)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTLOSS_DEVICE __device__ __forceinline__
// Ends the launch whether NDEBUG is defined or not, unlike assert(); that it does not return saves registers.
extern "C" __device__ __attribute__((noreturn)) void __assertfail(const char*, const char*, unsigned, const char*,
                                                                  size_t);
#else
#define FASTLOSS_DEVICE inline
#endif

namespace fastloss {
inline namespace FASTLOSS_ISA {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// Sixteen bytes: what one thread reads or writes at once.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / int(sizeof(T));
  T v[kSize];
};

#if !defined(FASTLOSS_CUDA_ON_HOST)

FASTLOSS_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
// Of 32 bits: half the work of the address arithmetic.
using SharedPointer = uint32_t;
FASTLOSS_DEVICE SharedPointer shared_pointer(void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 2^x; results below the normal range are zero.
FASTLOSS_DEVICE float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FASTLOSS_DEVICE uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
FASTLOSS_DEVICE uint32_t max_float16x2(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
FASTLOSS_DEVICE uint32_t to_bfloat16x2(float low, float high) {
  uint32_t c;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
  return c;
}
FASTLOSS_DEVICE uint32_t to_float16x2(float low, float high) {
  uint32_t c;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
  return c;
}
FASTLOSS_DEVICE float from_float16(uint16_t h) { return __half2float(__ushort_as_half(h)); }
// The low and the high bfloat16 of a word. In assembly: a shift that gives a float needs no move between registers.
FASTLOSS_DEVICE float low_bfloat16(uint32_t w) {
  float x;
  asm("shl.b32 %0, %1, 16;" : "=f"(x) : "r"(w));
  return x;
}
FASTLOSS_DEVICE float high_bfloat16(uint32_t w) {
  float x;
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(x) : "r"(w));
  return x;
}

// One access of sixteen bytes, to global memory; the compiler makes several of it where branches meet.
FASTLOSS_DEVICE void store(Chunk<uint32_t>* p, const Chunk<uint32_t>& c) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(c.v[0]), "r"(c.v[1]),
               "r"(c.v[2]), "r"(c.v[3])
               : "memory");
}
FASTLOSS_DEVICE void store(Chunk<float>* p, const Chunk<float>& c) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(c.v[0]), "f"(c.v[1]),
               "f"(c.v[2]), "f"(c.v[3])
               : "memory");
}
FASTLOSS_DEVICE void store(Chunk<double>* p, const Chunk<double>& c) {
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "d"(c.v[0]), "d"(c.v[1])
               : "memory");
}
FASTLOSS_DEVICE Chunk<uint32_t> load(const Chunk<uint32_t>* p) {
  const uint4 c = *reinterpret_cast<const uint4*>(p);
  return {{c.x, c.y, c.z, c.w}};
}
FASTLOSS_DEVICE Chunk<float> load(const Chunk<float>* p) {
  const float4 c = *reinterpret_cast<const float4*>(p);
  return {{c.x, c.y, c.z, c.w}};
}
FASTLOSS_DEVICE Chunk<double> load(const Chunk<double>* p) {
  const double2 c = *reinterpret_cast<const double2*>(p);
  return {{c.x, c.y}};
}

// The low word of (high:low) >> shift, shift < 32.
FASTLOSS_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, int shift) {
  return __funnelshift_r(low, high, shift);
}

// Asynchronous copies from global to shared memory. They are there for the thread that asked once it has waited, and
// for its block after a barrier.
FASTLOSS_DEVICE void copy_async(SharedPointer shared, const char* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
FASTLOSS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FASTLOSS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Thread-block clusters: blocks that run at the same time and read each other's shared memory.
FASTLOSS_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// What stands at the same place in the shared memory of block `rank`.
template <class T>
FASTLOSS_DEVICE const T* cluster_map(const T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return reinterpret_cast<const T*>(there);
#else
  return shared;
#endif
}

#else  // on the host

using cuda_on_host::cluster_map;
using cuda_on_host::cluster_sync;
using cuda_on_host::shared_memory;

inline float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}
using SharedPointer = unsigned char*;
inline SharedPointer shared_pointer(void* p) { return static_cast<unsigned char*>(p); }
inline void copy_async(SharedPointer shared, const char* global) { cuda_on_host::copy_async_16(shared, global); }
inline void copy_async_commit() { cuda_on_host::copy_async_commit(); }
template <int kPending>
inline void copy_async_wait() {
  cuda_on_host::copy_async_wait(kPending);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, int shift) {
  return uint32_t(((uint64_t(high) << 32) | low) >> shift);
}

template <class T>
inline void store(Chunk<T>* p, const Chunk<T>& c) {
  *p = c;
}
template <class T>
inline Chunk<T> load(const Chunk<T>* p) {
  return *p;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float from_float16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float finite = from_bits(magnitude << 13) * 0x1p112f;  // moves the exponent; exact for subnormals too
  return from_bits((magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits_of(finite)) | uint32_t(h >> 15)
                                                                                                    << 31);
}
inline float low_bfloat16(uint32_t w) { return from_bits(w << 16); }
inline float high_bfloat16(uint32_t w) { return from_bits(w & 0xffff0000u); }
inline uint32_t to_float16(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu, sign = (bits_of(x) >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) return sign | (bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u);
  return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}
inline uint32_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t to_float16x2(float low, float high) { return to_float16(low) | to_float16(high) << 16; }
inline uint32_t to_bfloat16x2(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }

// The larger halves; the other where one is NaN.
template <class Widen>
inline uint32_t max_halves(uint32_t a, uint32_t b, Widen widen) {
  uint32_t larger = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t x = a >> shift & 0xffffu, y = b >> shift & 0xffffu;
    const float fx = widen(x), fy = widen(y);
    larger |= (fy > fx || fx != fx ? y : x) << shift;
  }
  return larger;
}
inline uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  return max_halves(a, b, [](uint32_t h) { return from_bits(h << 16); });
}
inline uint32_t max_float16x2(uint32_t a, uint32_t b) {
  return max_halves(a, b, [](uint32_t h) { return from_float16(uint16_t(h)); });
}

#endif

// An error of the caller that only the device can see: the launch fails as with torch's own losses, nothing is written.
#define FASTLOSS_ASSERT(condition, message) \
  if (!(condition)) __assertfail(message, __FILE__, __LINE__, __func__, 1)

FASTLOSS_DEVICE int lane_id() { return int(threadIdx.x) % kWarp; }
FASTLOSS_DEVICE int warp_id() { return int(threadIdx.x) / kWarp; }

constexpr float kLog2E = 1.44269504088896340736f;

// x += step, which the compiler must take as it stands: left to itself it keeps an induction variable, or makes a
// multiplication, for every access of an unrolled loop, and spends more on them than on the accesses.
template <class T>
FASTLOSS_DEVICE void advance(T& x, int step) {
  x += step;
#if !defined(FASTLOSS_CUDA_ON_HOST)
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(x));
  else
    asm volatile("" : "+r"(x));
#endif
}

// Up to here the rounding error of a float is below one: two to its power neither overflows nor vanishes, and can be
// put right. Further out, where finite masks live, differences are taken of rounded numbers, of which the largest is
// zero.
constexpr float kNear = 1 << 24;

// e^t for t = z - centre, and the sums' other needs, in the compute type.
FASTLOSS_DEVICE float exponential(float t) { return exp2_flushed(t * kLog2E); }
FASTLOSS_DEVICE double exponential(double t) { return std::exp(t); }
FASTLOSS_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
FASTLOSS_DEVICE double larger(double a, double b) { return fmax(a, b); }
FASTLOSS_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
FASTLOSS_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
// Rounded, whatever is added to it.
#if !defined(FASTLOSS_CUDA_ON_HOST)
FASTLOSS_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
FASTLOSS_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
#else
template <class F>
inline F product(F a, F b) {
  return a * b;
}
#endif

// x scale - M, where M is the rounded product of the largest x.
template <class F>
FASTLOSS_DEVICE F difference(F x, F scale, F M) {
  return (M < 0 ? -M : M) < F(kNear) ? fused(x, scale, -M) : product(x, scale) - M;
}

// e^(top scale - M) over 2^(top rate - fl(top rate)): what rounding a centre took from exponentials around it.
FASTLOSS_DEVICE float put_right(float top, float M, float scale, float rate) {
  return exp2_flushed(fused(fused(top, scale, -M), kLog2E, fused(top, -rate, top * rate)));
}

template <class F>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kLowest = -FLT_MAX;
};
template <>
struct Limits<double> {
  static constexpr double kLowest = -DBL_MAX;
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
