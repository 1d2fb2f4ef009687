// The matrix products of losses of hidden states (see Product in rows.h), summed in F whatever the operands' types.
//
// Operands are packed into panels as wide as a register tile, kRowsOf rows of A or kColsOf columns of B, converted to F
// on the way; the tile is added up in registers over kDepth terms at a time. The smaller matrix is packed once for all
// threads; blocks of the larger are packed by whoever computes with them, into their own cache.
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

// One number of an element type E.
template <class E, class F>
inline F widened(const typename E::Storage* p) {
  if constexpr (sizeof(typename E::Storage) == sizeof(F)) {
    return *p;
  } else {
    typename E::Storage lanes[kLanes<F>] = {*p};
    return E::get(lanes)[0];
  }
}

// Four consecutive numbers.
template <class F>
struct Four {
  typedef F Vec __attribute__((vector_size(4 * sizeof(F))));
};
template <class E, class F>
inline typename Four<F>::Vec four(const typename E::Storage* p) {
  typename Four<F>::Vec v;
  if constexpr (sizeof(typename E::Storage) == sizeof(F)) {
    std::memcpy(&v, p, sizeof v);
  } else if constexpr (std::is_same_v<E, BFloat16>) {
    typedef uint16_t In __attribute__((vector_size(8)));
    typedef uint32_t Out __attribute__((vector_size(16)));
    In in;
    std::memcpy(&in, p, sizeof in);
    v = (typename Four<F>::Vec)(__builtin_convertvector(in, Out) << 16);
  } else {
    for (int i = 0; i < 4; ++i) v[i] = widened<E, F>(p + i);
  }
  return v;
}

template <class V>
inline void transpose_four(V& a, V& b, V& c, V& d) {
  const V ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const V cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5), b = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5), d = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
}

// A panel: `width` numbers (of which `n` exist, the rest are zero) of each of `depth` steps. Numbers of a step lie
// `across` elements apart, steps `along`.
template <class E, int width, class F>
inline void pack_panel(const typename E::Storage* p, int64_t n, int64_t across, int64_t depth, int64_t along, F* out) {
  if (along == 1) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      const auto* q = p + i * across;
      int64_t k = 0;
      for (; k + 4 <= depth; k += 4) {
        auto a = four<E, F>(q + k), b = four<E, F>(q + across + k), c = four<E, F>(q + 2 * across + k),
             d = four<E, F>(q + 3 * across + k);
        transpose_four(a, b, c, d);
        F* to = out + k * width + i;
        store(to, a), store(to + width, b), store(to + 2 * width, c), store(to + 3 * width, d);
      }
      for (; k < depth; ++k)
        for (int r = 0; r < 4; ++r) out[k * width + i + r] = widened<E, F>(q + r * across + k);
    }
    for (; i < n; ++i)
      for (int64_t k = 0; k < depth; ++k) out[k * width + i] = widened<E, F>(p + i * across + k);
    for (; i < width; ++i)
      for (int64_t k = 0; k < depth; ++k) out[k * width + i] = 0;
    return;
  }
  for (int64_t k = 0; k < depth; ++k, p += along, out += width) {
    if (across == 1 && n == width) {
      int i = 0;
      if constexpr (width % kLanes<F> == 0) {
        for (; i < width; i += kLanes<F>) store(out + i, E::get(p + i));
      } else {
        for (; i + 4 <= width; i += 4) store(out + i, four<E, F>(p + i));
        for (; i < width; ++i) out[i] = widened<E, F>(p + i);
      }
      continue;
    }
    for (int64_t i = 0; i < width; ++i) out[i] = i < n ? widened<E, F>(p + i * across) : F(0);
  }
}

// Rows [i, i + n) of A, or with the strides exchanged columns of B, over `depth` terms from k, in panels.
template <int width, class F>
inline void pack(const Strided& m, int64_t i, int64_t n, int64_t k, int64_t depth, F* out) {
  visit<F>(m.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t j = 0; j < n; j += width, out += width * depth)
      pack_panel<E, width, F>(reinterpret_cast<const typename E::Storage*>(m.at(i + j, k)),
                              std::min<int64_t>(width, n - j), m.row_stride, depth, m.col_stride, out);
  });
}

inline Strided transposed(Strided m) {
  std::swap(m.rows, m.cols);
  std::swap(m.row_stride, m.col_stride);
  return m;
}

// C's tile of `rows` x `cols` numbers (+)= panel a times panel b; `start` is added instead of C's own numbers, per
// column, where C holds nothing yet.
template <class F>
inline void tile_product(const F* a, const F* b, int64_t depth, F* c, int64_t stride, int rows, int cols, bool add,
                         const F* start) {
  constexpr int L = kLanes<F>, R = kTileRows;
  for (int r = 0; r < rows; ++r)  // while the sums are made C's lines arrive
    __builtin_prefetch(c + r * stride, 1), __builtin_prefetch(c + r * stride + 2 * L - 1, 1);
  Vec<F> totals[R][2] = {};
  for (int64_t k = 0; k < depth; k += kRun) {
    Vec<F> sums[R][2] = {};
    for (int64_t t = std::min(kRun, depth - k); t > 0; --t, a += R, b += 2 * L) {
      const Vec<F> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sums[r][0] += a[r] * b0;
        sums[r][1] += a[r] * b1;
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

template <class F>
void pack(const Operand& m, int64_t i, int64_t n, int64_t k, int64_t depth, F* out) {
  if (m.width == kTileRows)
    pack<kTileRows>(m.matrix, i, n, k, depth, out);
  else
    pack<kTileCols<F>>(m.matrix, i, n, k, depth, out);
}

template <class F>
void matmul(const Product& p) {
  const Operand a{p.a, p.a.rows, kTileRows}, b{transposed(p.b), p.b.cols, kTileCols<F>};
  const bool tall = a.count > b.count;
  const Operand &large = tall ? a : b, &small = tall ? b : a;
  F* const out = static_cast<F*>(p.out);
  const F* const start = static_cast<const F*>(p.start);
  const int64_t K = p.a.cols, depth = std::max<int64_t>(1, std::min(K, kDepth));
  const int64_t block = std::max<int64_t>(1, kBlockBytes / int64_t(sizeof(F)) / depth / large.width) * large.width;
  const int64_t blocks = (large.count + block - 1) / block, panels = (small.count + small.width - 1) / small.width;
  const Aligned<F> shared = aligned_array<F>(panels * small.width * depth);
  for (int64_t k = 0; k == 0 || k < K; k += depth) {
    const int64_t d = std::min(depth, K - k);
    const bool add = p.add || k > 0;
    parallel_for(panels, 4 * small.width * d, p.threads, [&](int64_t from, int64_t to) {
      const int64_t i = from * small.width;
      pack(small, i, std::min(small.count, to * small.width) - i, k, d, shared.get() + i * d);
    });
    parallel_for(blocks, block * small.count * d, p.threads, [&](int64_t from, int64_t to) {
      const Aligned<F> own = aligned_array<F>(block * d);
      for (int64_t o = from * block; o < std::min(large.count, to * block); o += block) {
        const int64_t n = std::min(block, large.count - o);
        pack(large, o, n, k, d, own.get());
        // A panel of the small matrix stays in the first-level cache while the block passes by.
        for (int64_t s = 0; s < small.count; s += small.width)
          for (int64_t l = 0; l < n; l += large.width) {
            const F *x = own.get() + l * d, *y = shared.get() + s * d;
            const int64_t i = tall ? o + l : s, j = tall ? s : o + l;
            tile_product(tall ? x : y, tall ? y : x, d, out + i * p.stride + j, p.stride,
                         int(std::min<int64_t>(kTileRows, a.count - i)),
                         int(std::min<int64_t>(kTileCols<F>, b.count - j)), add, start ? start + j : nullptr);
          }
      }
    });
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
