// AVX-512 on a processor of AVX2, for `make avx512`, which includes this before all else: the intrinsics that the CPU
// kernels call, by SIMDe. What else the kernels do with vectors the compiler makes two of AVX2's.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>

namespace avx512_on_avx2 {

typedef uint16_t Bits16 __attribute__((vector_size(64)));
typedef uint32_t Bits32 __attribute__((vector_size(64)));

inline __m512i join(__m256i low, __m256i high) {
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}
inline __m256i low(__m512i v) { return simde_mm512_extracti64x4_epi64(v, 0); }
inline __m256i high(__m512i v) { return simde_mm512_extracti64x4_epi64(v, 1); }

// ---- what SIMDe lacks ----------------------------------------------------------------------------------------------

inline void stream_ps(float* p, __m512 v) {
  _mm256_stream_ps(p, (__m256)low((__m512i)v));
  _mm256_stream_ps(p + 8, (__m256)high((__m512i)v));
}
inline __m512i cvtepu16_epi32(__m256i v) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
inline __m512 cvtph_ps(__m256i v) {
  return (__m512)join((__m256i)_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                      (__m256i)_mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
template <int rounding>
__m256i cvtps_ph(__m512 v) {
  return _mm256_set_m128i(_mm256_cvtps_ph((__m256)high((__m512i)v), rounding),
                          _mm256_cvtps_ph((__m256)low((__m512i)v), rounding));
}

// Of float32, and below of a bfloat16: what is below the normal range becomes a zero of its sign.
inline Bits32 flushed(Bits32 v) { return (v & 0x7f800000u) == 0 ? v & 0x80000000u : v; }
inline Bits16 flushed(Bits16 v) { return (Bits16)((v & uint16_t(0x7f80)) == 0 ? v & uint16_t(0x8000) : v); }

// To the nearest, of two to the even one.
inline __m256bh cvtneps_pbh(__m512 v) {
  const Bits32 bits = flushed((Bits32)v), nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 rounded = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : nearest;
  typedef uint16_t Narrow __attribute__((vector_size(32)));
  return (__m256bh) __builtin_convertvector(rounded, Narrow);
}

// ---- what SIMDe does otherwise -------------------------------------------------------------------------------------

// The instruction knows no numbers below the normal range.
inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const __m512 exact =
      simde_mm512_dpbf16_ps((__m512)flushed((Bits32)sum), (__m512bh)flushed((Bits16)a), (__m512bh)flushed((Bits16)b));
  return (__m512)flushed((Bits32)exact);
}

}  // namespace avx512_on_avx2

#undef _mm512_stream_ps
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtneps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_stream_ps avx512_on_avx2::stream_ps
#define _mm512_cvtepu16_epi32 avx512_on_avx2::cvtepu16_epi32
#define _mm512_cvtph_ps avx512_on_avx2::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) avx512_on_avx2::cvtps_ph<rounding>(v)
#define _mm512_cvtneps_pbh avx512_on_avx2::cvtneps_pbh
#define _mm512_dpbf16_ps avx512_on_avx2::dpbf16_ps

// Only now: SIMDe and the compiler's own headers must not think that the processor has it.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if defined(EMULATED_avx512_bf16)
#define __AVX512BF16__ 1
#endif
