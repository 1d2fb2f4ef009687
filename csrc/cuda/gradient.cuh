// From a row's statistics to its gradient: the coefficients, once a row; the epilogue, over the slice's chunks.
#pragma once

#include "reduce.cuh"
#include "rows.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// How a plain gradient k e^(z - centre) is computed; each saves a multiplication for each logit over the one before.
enum class Form : int {
  kZero,    // nothing asked, nothing but zeros
  kFar,     // k exp2((x scale - centre) log2(e)): for any centre
  kNear,    // k exp2(x rate + shift): the centre's rounding in powers of two goes into k
  kFolded,  // exp2(x rate + shift), k within the shift: for 16 bits, a few rounding errors of float32 are nothing
};

// What every thread of a block needs to write its part of a gradient; in shared memory.
template <class F>
struct Gradient {
  Coefficients<F> c;  // times the linear part of phi'
  F centre = 0;
  F k = 0;                // exponentials times k are probabilities (plain: times A, too)
  F rate = 0, shift = 0;  // Form::kNear, kFolded
  F target = 0;           // the target's own entry
  int64_t column = -1;    // of the target, or -1
  F listed_A = 0, listed_centre = 0, listed_log_sum = 0;  // of the classes that a target lists
  Form form = Form::kFar;
};

template <class F>
FASTLOSS_DEVICE F scalar(const void* p) {
  return *static_cast<const F*>(p);
}

template <class F>
FASTLOSS_DEVICE bool nothing_to_do(const Upstreams& u) {
  return u.unless_one && u.losses.at(0, F(0)) == 1;
}

template <class F>
FASTLOSS_DEVICE Upstream<F> upstream_of(const Upstreams& u, int64_t row, bool ignored) {
  Upstream<F> g{u.losses.at(row, F(u.loss)), u.lse.at(row, F(0)), u.log_prob.at(row, F(0)), u.entropy.at(row, F(0))};
  g.loss *= u.token_weight.at(row, F(1));
  if (u.denominator) g.loss = quotient(g.loss, scalar<F>(u.denominator));
  if (ignored) g = {};
  return g;
}

// The class index of a row's target, checked; -1 where there is none.
FASTLOSS_DEVICE int64_t target_of(const Rows& rows, int64_t row) {
  if (rows.spec.objective != Objective::kIndex || rows.ignored(row)) return -1;
  const int64_t y = rows.target[row];
  FASTLOSS_ASSERT(y >= 0 && y < rows.input.cols, "target: class index out of bounds");
  return y;
}

template <class F>
FASTLOSS_DEVICE F class_weight(const Rows& rows, int64_t j) {
  return rows.weight.present() ? static_cast<const F*>(rows.weight.data)[j] : F(1);
}

// The target's contribution. With label smoothing the row's mass is the sum of the class weights.
template <class F>
FASTLOSS_DEVICE RowTarget<F> row_target(const Rows& rows, int64_t row, int64_t y, const Columns<F>& columns,
                                        const RowState<F>& state) {
  RowTarget<F> target;
  target.weight_sum = state.mass;
  if (y < 0) return target;
  const F u = columns.bent(element<F>(rows.input.row(row), rows.input.dtype, y));
  target.logit = product(u, columns.scale);
  if (fabs(target.logit) < F(kNear)) target.residue = fused(columns.scale, u, -target.logit);
  target.weight = class_weight<F>(rows, y);
  return target;
}

// The same lse with a log_sum near zero, which a float holds with all its digits: exponentials of it keep theirs.
FASTLOSS_DEVICE void balance(RowStats<float>& s, float sum) {
  if (!(sum >= FLT_MIN && sum <= FLT_MAX)) return;
  constexpr float kHigh = 0x1.62e4p-1f, kLow = 0x1.7f7d1cp-20f;  // ln 2; kHigh times an exponent is exact
  int n;
  const float log_mantissa = std::log(frexpf(sum, &n)), step = float(n) * kHigh;
  const float centre = s.centre + step, part = centre - s.centre;
  const float lost = (s.centre - (centre - part)) + (step - part);
  s.log_sum = log_mantissa + (float(n) * kLow + lost);
  s.centre = centre;
}
FASTLOSS_DEVICE void balance(RowStats<double>&, double) {}

// The softcap's derivative, but for its linear part.
template <class F>
FASTLOSS_DEVICE F bend(F z, F cap) {
  const F ratio = quotient(z, cap);
  return 1 - ratio * ratio;
}

// Of all columns but those that a target names.
template <bool kGeneral, class F>
FASTLOSS_DEVICE Gradient<F> spread_of(const Rows& rows, const RowStats<F>& s, const Coefficients<F>& c,
                                      const Upstream<F>& g) {
  Gradient<F> out;
  if (g.loss == 0 && g.lse == 0 && g.log_prob == 0 && g.entropy == 0) out.form = Form::kZero;
  const F scale = F(rows.spec.logit_scale);
  out.c = {c.A * scale, c.E * scale, c.B * scale, c.C * scale, c.Q * scale};
  out.centre = s.centre;
  out.k = std::exp(-s.log_sum) * (kGeneral ? F(1) : out.c.A);
  return out;
}

// The entry of a class that a target names, t above the centre, but for the softcap.
template <bool kGeneral, class F>
FASTLOSS_DEVICE F entry_of(const Coefficients<F>& c, F t, F log_sum, F weight) {
  const F log_p = t - log_sum, p = std::exp(log_p);
  // Where p is nearly one, A p - B cancels and A - B + A (p - 1) does not; where p is small it is the other way round.
  const F dx = p < F(0.5) ? c.A * p - c.B : (c.A - c.B) + c.A * std::expm1(log_p < 0 ? log_p : log_p * 0);
  return kGeneral ? dx + ((p > 0 ? c.E * t * p : F(0)) - times(weight, c.C)) : dx;
}

template <bool kGeneral, class F>
FASTLOSS_DEVICE Gradient<F> gradient_of(const Rows& rows, const RowStats<F>& s, const RowTarget<F>& target, int64_t y,
                                        const Upstream<F>& g) {
  Coefficients<F> c = coefficients(rows.spec, s, target.weight, rows.input.cols, g);
  if (y < 0) c.B = 0;
  Gradient<F> out = spread_of<kGeneral>(rows, s, c, g);
  out.column = y;
  const F cap = F(rows.spec.softcap);
  out.target = entry_of<kGeneral>(out.c, (target.logit - s.centre) + target.residue, s.log_sum, target.weight);
  if (kGeneral && cap > 0) out.target *= bend(target.logit, cap);
  return out;
}

// A plain gradient's quickest form that loses nothing.
FASTLOSS_DEVICE void choose_form(Gradient<float>& g, float scale, bool sixteen_bits) {
  const float rate = scale * kLog2E, top = quotient(g.centre, scale), shift = top * rate;
  if (g.form == Form::kZero || !(fabsf(shift) < kNear)) return;
  g.form = Form::kNear;
  g.rate = rate;
  g.shift = -shift;
  g.k *= put_right(top, g.centre, scale, rate);
  if (!sixteen_bits || !(fabsf(shift) < 64) || !(g.k >= FLT_MIN && g.k <= FLT_MAX)) return;
  g.form = Form::kFolded;
  g.shift += log2f(g.k);
}
FASTLOSS_DEVICE void choose_form(Gradient<double>&, double, bool) {}

// The gradient of one element, the target's share apart.
template <Form kForm>
FASTLOSS_DEVICE float plain_gradient(float x, const Gradient<float>& g, float scale) {
  if (kForm == Form::kFar) return g.k * exponential(difference(x, scale, g.centre));
  const float e = exp2_flushed(fused(x, g.rate, g.shift));
  return kForm == Form::kNear ? g.k * e : e;
}
template <Form>
FASTLOSS_DEVICE double plain_gradient(double x, const Gradient<double>& g, double scale) {
  return g.k * exponential(difference(x, scale, g.centre));
}
template <class F>
FASTLOSS_DEVICE F general_gradient(F x, int j, const Gradient<F>& g, const Columns<F>& columns) {
  const F u = columns.bent(x), t = difference(u, columns.scale, g.centre), p = exponential(t) * g.k;
  const F w = g.c.C != 0 ? columns.class_weight(j) : F(0);
  const F q = columns.probs && g.c.Q != 0 ? columns.probability(j) : F(0);
  const F dx = epilogue(g.c, p, p > 0 && g.c.E != 0 ? t : F(0), w, q);
  return columns.cap > 0 ? dx * bend(u, columns.cap) : dx;
}

// Where a block writes its slice's gradient: whole chunks, where they lie at boundaries like the slice's own.
template <class E>
struct Destination {
  using T = typename E::Storage;
  using Chunk = typename E::Chunk;
  static constexpr int K = E::kCount;
  T* data;
  int count, first_whole, end_whole;

  FASTLOSS_DEVICE Destination(const Slice<E>& slice, const Matrix& grad, int64_t row, int64_t begin)
      : data(reinterpret_cast<T*>(grad.row(row)) + begin), count(slice.count) {
    const bool alike = int(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T)) == slice.lead;
    first_whole = slice.first_whole();
    end_whole = alike ? slice.end_whole() : 0;
  }

  // The elements of a chunk from a column that may lie before the slice's first, and end after its last.
  FASTLOSS_DEVICE void put(int column, const Chunk& c) const {
    const T* elements = reinterpret_cast<const T*>(&c);
    for (int i = 0; i < K; ++i)
      if (column + i >= 0 && column + i < count) data[column + i] = elements[i];
  }
};

enum class Source { kNone, kShared, kGlobal };

// to = map(chunk from the source, its first column) for all chunks of a slice: whole ones in one access, ends by
// element. What comes from global memory is read once, and may be where the gradient goes.
template <Source kSource, int kBatch, class E, class Map>
FASTLOSS_DEVICE void for_chunks(const Slice<E>& slice, const Destination<E>& to, Map&& map) {
  using Chunk = typename E::Chunk;
  const int step = int(blockDim.x), me = int(threadIdx.x) - slice.skew(), chunks = slice.chunks();
  const Chunk* from = (kSource == Source::kShared ? slice.staged() : slice.boundary()) + me;
  const int stride = step * int(sizeof(Chunk));
  char* out = reinterpret_cast<char*>(reinterpret_cast<Chunk*>(to.data - slice.lead) + me);
#pragma unroll 1
  for (int first = me; first < chunks; first += kBatch * step) {
    if (first >= to.first_whole && first + (kBatch - 1) * step < to.end_whole) {
      Chunk in[kBatch];
      for (int k = 0; k < kBatch; ++k, from += step) in[k] = kSource == Source::kNone ? Chunk{} : load(from);
      for (int k = 0; k < kBatch; ++k, advance(out, stride))
        store(reinterpret_cast<Chunk*>(out), map(in[k], slice.column(first + k * step)));
      continue;
    }
    for (int c = first; c < chunks && c < first + kBatch * step; c += step, from += step, out += stride) {
      if (c < 0) continue;
      Chunk in = {};
      if (kSource == Source::kShared || (kSource == Source::kGlobal && slice.whole(c)))
        in = load(from);
      else if (kSource == Source::kGlobal)
        in = slice.partial(c);
      const Chunk mapped = map(in, slice.column(c));
      if (c >= to.first_whole && c < to.end_whole)
        store(reinterpret_cast<Chunk*>(out), mapped);
      else
        to.put(slice.column(c), mapped);
    }
  }
}

// The gradient of a chunk, in one of its forms.
template <class E, Form kForm>
struct PlainMap {
  using F = typename E::Compute;
  const Gradient<F>& g;
  F scale;
  FASTLOSS_DEVICE typename E::Chunk operator()(const typename E::Chunk& in, int) const {
    F v[E::kCount];
    E::unpack(in, v);
    for (F& x : v) x = plain_gradient<kForm>(x, g, scale);
    return E::pack(v);
  }
};
template <class E>
struct GeneralMap {
  using F = typename E::Compute;
  const Gradient<F>& g;
  const Columns<F>& columns;
  int count;
  FASTLOSS_DEVICE typename E::Chunk operator()(const typename E::Chunk& in, int column) const {
    F v[E::kCount];
    E::unpack(in, v);
    for (int i = 0; i < E::kCount; ++i) {
      const int j = column + i;
      v[i] = j >= 0 && j < count ? general_gradient(v[i], j, g, columns) : F(0);
    }
    return E::pack(v);
  }
};

template <bool kGeneral, Source kSource, class E, class F = typename E::Compute>
FASTLOSS_DEVICE void write_gradient(const Slice<E>& slice, const Destination<E>& to, const Gradient<F>& shared,
                                    const Columns<F>& columns) {
  const Gradient<F> g = shared;
  if (kGeneral)
    for_chunks<kSource, 1>(slice, to, GeneralMap<E>{g, columns, slice.count});
  else if (g.form == Form::kFolded)
    for_chunks<kSource, kBatch<E>>(slice, to, PlainMap<E, Form::kFolded>{g, columns.scale});
  else if (g.form == Form::kNear)
    for_chunks<kSource, kBatch<E>>(slice, to, PlainMap<E, Form::kNear>{g, columns.scale});
  else
    for_chunks<kSource, kBatch<E>>(slice, to, PlainMap<E, Form::kFar>{g, columns.scale});
  // By the thread that wrote the chunk around it, after that.
  const int64_t y = g.column - columns.begin;
  if (g.column < 0 || y < 0 || y >= slice.count ||
      (slice.chunk_of(int(y)) + slice.skew()) % int(blockDim.x) != int(threadIdx.x))
    return;
  to.data[y] = E::put(g.target);
}

template <class E>
FASTLOSS_DEVICE void write_zeros(const Slice<E>& slice, const Destination<E>& to) {
  for_chunks<Source::kNone, 4>(slice, to, [](const typename E::Chunk&, int) { return typename E::Chunk{}; });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
