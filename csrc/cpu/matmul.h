// The matrix products of losses of hidden states (see Product in rows.h), summed in F whatever the operands' types.
//
// Operands are packed into panels as wide as a register tile, kTileRows rows of A or kTileCols columns of B, as what
// one step of the sums takes of them: a number converted to F, or where both are bfloat16 and the processor multiplies
// them as they are, a pair (Singles and Pairs below, the type T). The tile is added up in registers over kDepth terms
// at a time. The smaller matrix is packed once for all threads; blocks of the larger are packed by whoever computes
// with them, into their own cache.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace fastloss {

inline namespace FASTLOSS_ISA {

// The register tile: as many accumulators as the registers hold beside two vectors of B and a broadcast of A.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
template <class F>
constexpr int kTileCols = 2 * kLanes<F>;
constexpr int64_t kRun = 128;                      // terms added up in a row: their rounding errors grow with its root
constexpr int64_t kDepth = 1024;                   // terms of a sum between two stores
constexpr int64_t kBlockBytes = int64_t(1) << 17;  // of the packed block that stays in a core's cache

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class F>
struct AlignedFree {
  void operator()(F* p) const { std::free(p); }
};
template <class F>
using Aligned = std::unique_ptr<F[], AlignedFree<F>>;

template <class F>
Aligned<F> aligned_array(int64_t count) {
  void* p = std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(count, 1) * int64_t(sizeof(F)), 64)));
  if (!p) throw std::bad_alloc();
  return Aligned<F>(static_cast<F*>(p));
}

template <class P>
struct FourOf {
  typedef P Vec __attribute__((vector_size(4 * sizeof(P))));
};
template <class P>
using Four = typename FourOf<P>::Vec;

template <class E, class F>
struct Single;

// What one step of the sums takes of an operand, as `Packed`: one number, whatever its type, as F.
template <class F>
struct Singles {
  using Sum = F;
  using Packed = F;
  static constexpr int kTerms = 1;

  static Vec<F> add(Vec<F> sum, F a, Vec<F> b) { return sum + a * b; }

  // Calls f with how an operand of this type is read.
  template <class Fn>
  static void visit(DType dtype, Fn&& f) {
    fastloss::visit<F>(dtype, [&](auto element) { f(Single<decltype(element), F>{}); });
  }
};

// Of an element type E.
template <class E, class F>
struct Single : Singles<F> {
  using Storage = typename E::Storage;

  // The step that begins at p; its numbers lie `along` elements apart, and `left` of them and those after it exist.
  static F one(const Storage* p, int64_t = 1, int64_t = 1) {
    if constexpr (sizeof(Storage) == sizeof(F)) {
      return *p;
    } else {
      Storage lanes[kLanes<F>] = {*p};
      return E::get(lanes)[0];
    }
  }

  // Four steps, all numbers side by side.
  static Four<F> four(const Storage* p) {
    Four<F> v;
    if constexpr (sizeof(Storage) == sizeof(F)) {
      std::memcpy(&v, p, sizeof v);
    } else if constexpr (std::is_same_v<E, BFloat16>) {
      typedef uint16_t In __attribute__((vector_size(8)));
      typedef uint32_t Out __attribute__((vector_size(16)));
      In in;
      std::memcpy(&in, p, sizeof in);
      v = (Four<F>)(__builtin_convertvector(in, Out) << 16);
    } else {
      for (int i = 0; i < 4; ++i) v[i] = one(p + i);
    }
    return v;
  }

  // One step of each of a vector of neighbours.
  static Vec<F> across(const Storage* p, int64_t) { return E::get(p); }
};

#if defined(__AVX512BF16__)
// Two bfloat16, whose products are exact in float32: sums as good as Singles', by half the instructions. To this
// instruction, whatever the processor's mode, numbers and sums below 2^-126 are zeros.
struct Pairs {
  using Sum = float;
  using Packed = uint32_t;
  using Storage = uint16_t;
  static constexpr int kTerms = 2;

  static Vec<float> add(Vec<float> sum, uint32_t a, Bits b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)broadcast(a), (__m512bh)b);
  }

  template <class Fn>
  static void visit(DType, Fn&& f) {
    f(Pairs{});
  }
  static uint32_t one(const uint16_t* p, int64_t along, int64_t left) {
    return p[0] | (left > 1 ? uint32_t(p[along]) << 16 : 0);
  }
  static Four<uint32_t> four(const uint16_t* p) { return load_as<Four<uint32_t>>(p); }
  static Bits across(const uint16_t* p, int64_t along) {
    return widen(load_as<Half>(p)) | (widen(load_as<Half>(p + along)) << 16);
  }
};
#endif

// Calls f with how operands of these types are multiplied.
template <class F, class Fn>
inline void visit([[maybe_unused]] DType a, [[maybe_unused]] DType b, Fn&& f) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(F) == sizeof(float))
    if (a == DType::kBFloat16 && b == DType::kBFloat16) return f(Pairs{});
#endif
  f(Singles<F>{});
}

template <class T>
inline int64_t steps_of(int64_t terms) {
  return (terms + T::kTerms - 1) / T::kTerms;
}
// The steps between two stores.
template <class T>
inline int64_t depth_of(int64_t terms) {
  return std::clamp<int64_t>(steps_of<T>(terms), 1, kDepth / T::kTerms);
}

template <class V>
inline void transpose_four(V& a, V& b, V& c, V& d) {
  const V ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const V cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5), b = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5), d = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
}

// One row of A, or column of B, of a panel of `width`: `terms` numbers, `along` elements apart.
template <class R, int width>
inline void pack_row(const typename R::Storage* p, int64_t terms, int64_t along, typename R::Packed* out) {
  for (; terms > 0; terms -= R::kTerms, p += R::kTerms * along, out += width) *out = R::one(p, along, terms);
}

// A panel: of each step `width` rows, of which `n` exist, the rest are zero. Rows lie `across` elements apart.
template <class R, int width>
inline void pack_panel(const typename R::Storage* p, int64_t n, int64_t across, int64_t terms, int64_t along,
                       typename R::Packed* out) {
  using P = typename R::Packed;
  const int64_t depth = steps_of<R>(terms), whole = terms / R::kTerms;  // steps, and those that lack no number
  if (along == 1) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      const auto* q = p + i * across;
      int64_t k = 0;
      for (; k + 4 <= whole; k += 4) {
        const auto* at = q + k * R::kTerms;
        auto a = R::four(at), b = R::four(at + across), c = R::four(at + 2 * across), d = R::four(at + 3 * across);
        transpose_four(a, b, c, d);
        P* to = out + k * width + i;
        store(to, a), store(to + width, b), store(to + 2 * width, c), store(to + 3 * width, d);
      }
      for (int r = 0; r < 4; ++r)
        pack_row<R, width>(q + r * across + k * R::kTerms, terms - k * R::kTerms, 1, out + k * width + i + r);
    }
    for (; i < n; ++i) pack_row<R, width>(p + i * across, terms, 1, out + i);
    for (; i < width; ++i)
      for (int64_t k = 0; k < depth; ++k) out[k * width + i] = 0;
    return;
  }
  for (int64_t k = 0; k < depth; ++k, p += R::kTerms * along, out += width) {
    int64_t i = 0;
    if (across == 1 && n == width && k < whole) {
      if constexpr (width % kLanes<P> == 0)
        for (; i < width; i += kLanes<P>) store(out + i, R::across(p + i, along));
      else if constexpr (R::kTerms == 1)
        for (; i + 4 <= width; i += 4) store(out + i, R::four(p + i));
    }
    for (; i < width; ++i) out[i] = i < n ? R::one(p + i * across, along, terms - k * R::kTerms) : P(0);
  }
}

// Rows [i, i + n) of A, or with the strides exchanged columns of B, over `depth` steps from k, in panels.
template <class T, int width>
inline void pack(const Strided& m, int64_t i, int64_t n, int64_t k, int64_t depth, typename T::Packed* out) {
  const int64_t first = k * T::kTerms, terms = std::min(depth * T::kTerms, m.cols - first);
  T::visit(m.dtype, [&](auto read) {
    using R = decltype(read);
    for (int64_t j = 0; j < n; j += width, out += width * depth)
      pack_panel<R, width>(reinterpret_cast<const typename R::Storage*>(m.at(i + j, first)),
                           std::min<int64_t>(width, n - j), m.row_stride, terms, m.col_stride, out);
  });
}

inline Strided transposed(Strided m) {
  std::swap(m.rows, m.cols);
  std::swap(m.row_stride, m.col_stride);
  return m;
}

// C's tile of `rows` x `cols` numbers (+)= panel a times panel b; `start` is added instead of C's own numbers, per
// column, where C holds nothing yet.
template <class T, class F = typename T::Sum, class P = typename T::Packed>
inline void tile_product(const P* a, const P* b, int64_t depth, F* c, int64_t stride, int rows, int cols, bool add,
                         const F* start) {
  constexpr int64_t run = kRun / T::kTerms;
  constexpr int L = kLanes<F>, R = kTileRows;
  for (int r = 0; r < rows; ++r)  // while the sums are made C's lines arrive
    __builtin_prefetch(c + r * stride, 1), __builtin_prefetch(c + r * stride + 2 * L - 1, 1);
  Vec<F> totals[R][2] = {};
  for (int64_t k = 0; k < depth; k += run) {
    Vec<F> sums[R][2] = {};
    for (int64_t t = std::min(run, depth - k); t > 0; --t, a += R, b += 2 * L) {
      const Vec<P> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sums[r][0] = T::add(sums[r][0], a[r], b0);
        sums[r][1] = T::add(sums[r][1], a[r], b1);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) totals[r][0] += sums[r][0], totals[r][1] += sums[r][1];
  }
  if (rows == R && cols == 2 * L) {
    Vec<F> s0 = {}, s1 = {};
    if (start) s0 = load(start), s1 = load(start + L);
    for (int r = 0; r < R; ++r) {
      F* p = c + r * stride;
      store(p, totals[r][0] + (add ? load(p) : s0));
      store(p + L, totals[r][1] + (add ? load(p + L) : s1));
    }
    return;
  }
  F whole[R * 2 * L];
  std::memcpy(whole, totals, sizeof whole);
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < cols; ++j) {
      F* p = c + r * stride + j;
      *p = whole[r * 2 * L + j] + (add ? *p : start ? start[j] : F(0));
    }
}

// One operand as the loops below see it: `count` rows of A or columns of B, in panels of `width`.
struct Operand {
  Strided matrix;  // of B the transpose
  int64_t count, width;
};

template <class T>
void pack(const Operand& m, int64_t i, int64_t n, int64_t k, int64_t depth, typename T::Packed* out) {
  if (m.width == kTileRows)
    pack<T, kTileRows>(m.matrix, i, n, k, depth, out);
  else
    pack<T, kTileCols<typename T::Sum>>(m.matrix, i, n, k, depth, out);
}

template <class T>
void matmul_in(const Product& p) {
  using F = typename T::Sum;
  using P = typename T::Packed;
  const Operand a{p.a, p.a.rows, kTileRows}, b{transposed(p.b), p.b.cols, kTileCols<F>};
  const bool tall = a.count > b.count;
  const Operand &large = tall ? a : b, &small = tall ? b : a;
  F* const out = static_cast<F*>(p.out);
  const F* const start = static_cast<const F*>(p.start);
  const int64_t K = steps_of<T>(p.a.cols), depth = depth_of<T>(p.a.cols);
  const int64_t block = std::max<int64_t>(1, kBlockBytes / int64_t(sizeof(P)) / depth / large.width) * large.width;
  const int64_t blocks = (large.count + block - 1) / block, panels = (small.count + small.width - 1) / small.width;
  const Aligned<P> shared = aligned_array<P>(panels * small.width * depth);
  for (int64_t k = 0; k == 0 || k < K; k += depth) {
    const int64_t d = std::min(depth, K - k);
    const bool add = p.add || k > 0;
    parallel_for(panels, 4 * small.width * d, p.threads, [&](int64_t from, int64_t to) {
      const int64_t i = from * small.width;
      pack<T>(small, i, std::min(small.count, to * small.width) - i, k, d, shared.get() + i * d);
    });
    parallel_for(blocks, block * small.count * d, p.threads, [&](int64_t from, int64_t to) {
      const Aligned<P> own = aligned_array<P>(block * d);
      for (int64_t o = from * block; o < std::min(large.count, to * block); o += block) {
        const int64_t n = std::min(block, large.count - o);
        pack<T>(large, o, n, k, d, own.get());
        // A panel of the small matrix stays in the first-level cache while the block passes by.
        for (int64_t s = 0; s < small.count; s += small.width)
          for (int64_t l = 0; l < n; l += large.width) {
            const P *x = own.get() + l * d, *y = shared.get() + s * d;
            const int64_t i = tall ? o + l : s, j = tall ? s : o + l;
            tile_product<T>(tall ? x : y, tall ? y : x, d, out + i * p.stride + j, p.stride,
                            int(std::min<int64_t>(kTileRows, a.count - i)),
                            int(std::min<int64_t>(kTileCols<F>, b.count - j)), add, start ? start + j : nullptr);
          }
      }
    });
  }
}

template <class F>
void matmul(const Product& p) {
  visit<F>(p.a.dtype, p.b.dtype, [&](auto terms) { matmul_in<decltype(terms)>(p); });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
