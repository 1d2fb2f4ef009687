// All the work the CPU does per row. A row is read from memory once, tile by tile, into its state; with a gradient to
// write, the tiles' exponentials stay in a per-thread row (L2), and the second pass scales them on their way out.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "tiles.h"
#include "workspace.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {
namespace {

// A centre may lie this far below the maximum, in units of z: exponentials stay far from overflow, sums lose nothing.
constexpr double kSlack = 8;
constexpr int64_t kGlance = 256;

template <class F>
using Native = std::conditional_t<sizeof(F) == 8, Float64, Float32>;

template <class F>
class Row {
 public:
  Row(const Rows& rows, const ClassWeights<F>& weights, Workspace<F>& ws)
      : rows_(rows),
        weights_(weights),
        ws_(ws),
        spec_(rows.spec),
        V_(rows.input.cols),
        cap_(F(spec_.softcap)),
        // Without a softcap the scale rides along in the exponential, and a tile holds x.
        scale_(cap_ > 0 ? F(1) : F(spec_.logit_scale)) {}

  // The state of row i. Keep: leave in the workspace what gradient<true>() needs.
  template <bool Moment, bool Keep>
  RowState<double> reduce(int64_t i, int64_t* argmax = nullptr) {
    RowState<double> state;
    shift_ = 0;
    if (!try_reduce<Moment, Keep>(i, argmax, state)) {
      shift_ = row_max(i);
      state = {};
      try_reduce<Moment, Keep>(i, argmax, state);
    }
    if (state.sum > 0 && std::isfinite(peak_.logit)) sharpen_peak(state);
    state.centre += shift_ * double(scale_);
    return state;
  }

  RowTarget<double> target(int64_t i) const {
    RowTarget<double> y;
    y.weight_sum = weights_.sum;
    if (spec_.soft || rows_.ignored(i)) return y;
    y.logit = z_of(element(rows_.input, i, rows_.target[i]));
    y.weight = weights_.of(rows_.target[i]);
    return y;
  }

  // dx of row i, from what reduce<.., Keep> left (Kept), or from the logits again.
  template <bool Kept>
  void gradient(int64_t i, const RowStats<double>& s, const Coefficients<double>& c, double target_logit, char* out,
                DType dtype, bool streaming) {
    Coefficients<double> cs = c;
    for (double* v : {&cs.A, &cs.E, &cs.B, &cs.C, &cs.Q}) *v *= spec_.logit_scale;  // the linear part of phi'
    if (!Kept) shift_ = Centre<F>(F(s.centre / scale_), scale_).exact ? F(0) : F(s.centre / scale_);
    const double origin = s.centre - shift_ * double(scale_);  // s.centre in the units of the tiles
    // Statistics in float32 of logits near 1e10: the centre's rounding is in log_sum, and exponentials around it
    // vanish.
    const double anchor = std::abs(s.log_sum) > 64 ? origin + s.log_sum : origin;
    const Centre<F> centre(F(anchor / scale_), scale_);
    const F k = F(std::exp((centre.value - origin) - s.log_sum)), m = F(origin);
    const Coefficients<F> cf{F(cs.A + times(cs.E, m - origin)), F(cs.E), F(cs.B), F(cs.C), F(cs.Q)};
    for_tiles([&](int64_t j, int64_t n, int64_t t) {
      F *work = ws_.row + j, factor = 1;
      const Operands<F> operands{weights_.at(j), spec_.soft ? target_probs(i, j, n) : nullptr, m, scale_, cap_, shift_};
      if (Kept && !(cap_ > 0)) {
        const F kt = F(std::exp((ws_.centre[t] - origin) - s.log_sum));
        if (cf.C == 0 && cf.Q == 0)
          factor = cf.A * kt;  // plain cross-entropy: one multiplication, on the way out
        else
          gradient_tile<true, Native<F>>(work, work, padded<F>(n), centre, kt, cf, operands);
      } else if (Kept) {
        gradient_tile<false, Native<F>>(work, work, padded<F>(n), centre, k, cf, operands);
      } else {
        with_logits(i, j, n, work, [&](auto element, const auto* z, int64_t np) {
          gradient_tile<false, decltype(element)>(z, work, np, centre, k, cf, operands);
        });
      }
      write_tile<F>(work, factor, out + j * size_of(dtype), dtype, n, streaming);
    });
    if (spec_.soft || rows_.ignored(i)) return;
    const int64_t y = rows_.target[i];
    const F dy = target_gradient(s, cs, target_logit, y);
    write_tile<F>(&dy, F(1), out + y * size_of(dtype), dtype, 1, false);
  }

 private:
  const Rows& rows_;
  const ClassWeights<F>& weights_;
  Workspace<F>& ws_;
  const Spec& spec_;
  const int64_t V_;
  const F cap_, scale_;

  struct Peak {
    F logit;
    Centre<F> centre;
  };
  Peak peak_{-INFINITY, Centre<F>(0, 1)};  // the row's largest logit, and what its exponential was relative to
  F shift_ = 0;  // taken from a row's logits before anything else when they are too large for Centre's arithmetic

  // False where the row must be shifted first.
  template <bool Moment, bool Keep>
  bool try_reduce(int64_t i, int64_t* argmax, RowState<double>& state) {
    Centre<F> centre(0, scale_);
    F m = -INFINITY;
    peak_ = {-INFINITY, centre};
    if (argmax) *argmax = 0;
    const bool keep_z = Keep && cap_ > 0;
    bool near = true;
    for_tiles([&](int64_t j, int64_t n, int64_t t) {
      if (!near) return;
      with_logits(i, j, n, keep_z ? ws_.row + j : ws_.tile, [&](auto element, const auto* z, int64_t np) {
        using E = decltype(element);
        const auto sums_around = [&](F top) {
          if (top > -INFINITY) centre = Centre<F>(shift_ == 0 ? top : F(0), scale_), m = top;
          near = near && centre.exact;
          if constexpr (Keep)
            if (!keep_z) return tile_exp<Moment, true, E>(z, np, centre, ws_.row + j);
          return tile_exp<Moment, false, E>(z, np, centre, static_cast<F*>(nullptr));
        };
        // A look at the row's first columns is guess enough; a tile that proves it wrong is done again.
        ExpSums<F> sums = sums_around(m == -INFINITY ? tile_max<E, F>(z, std::min(np, kGlance)) : -INFINITY);
        const double limit = m == -INFINITY ? -INFINITY : centre.value + kSlack;
        if (double(sums.max) * scale_ > limit) sums = sums_around(sums.max);
        if (sums.max > peak_.logit) {
          peak_ = {sums.max, centre};
          if (argmax) *argmax = j + first_equal<E>(z, n, sums.max);
        }
        RowState<double> part{m > -INFINITY ? centre.value : -INFINITY, sums.sum, sums.moment};
        if (spec_.soft || spec_.label_smoothing > 0) {
          const F at = F(centre.value);
          const auto plain =
              tile_plain<E, F>(z, np, at, scale_, {spec_.soft ? target_probs(i, j, n) : weights_.at(j), n});
          part.plain = plain.plain + times(plain.mass, at - centre.value);
          part.mass = plain.mass;
        }
        if (Keep) ws_.centre[t] = part.centre;
        state = merge(state, part);
      });
    });
    return near;
  }

  // The largest exponential in double instead of as the vector code rounded it: where one class has nearly all the
  // probability, the loss is what is left of one, and has as many digits as that exponential.
  void sharpen_peak(RowState<double>& state) const {
    const auto parts = peak_.centre.split(broadcast(peak_.logit));
    const double rounded = peak_.centre.exp(parts)[0], rounded_log = peak_.centre.log2(parts)[0] / kLog2E;
    const double exact_log = double(peak_.logit) * scale_ - state.centre, exact = std::exp(exact_log);
    const double d = peak_.centre.value - state.centre, k = d == 0 ? 1 : std::exp(d);
    state.sum += exact - k * rounded;
    state.moment += exact * exact_log - k * rounded * (rounded_log + d);
  }

  F row_max(int64_t i) {
    F m = -INFINITY;
    for_tiles([&](int64_t j, int64_t n, int64_t) {
      with_logits(i, j, n, ws_.tile, [&](auto element, const auto* z, int64_t np) {
        m = std::max(m, tile_max<decltype(element), F>(z, np));
      });
    });
    return m;
  }

  // fn(first column, columns, tile): whole vectors, then what is left.
  template <class Fn>
  void for_tiles(Fn&& fn) const {
    for (int64_t j = 0, t = 0, n; j < V_; j += n, ++t) {
      n = std::min(kTile, V_ - j);
      if (n > kLanes<F>) n -= n % kLanes<F>;
      fn(j, n, t);
    }
  }

  // fn(element type, z, padded columns) on the logits where they lie, or in buf when they need work or padding (-inf).
  template <class Fn>
  void with_logits(int64_t i, int64_t j, int64_t n, F* buf, Fn&& fn) const {
    const DType dtype = rows_.input.dtype;
    const char* x = rows_.input.row(i) + j * size_of(dtype);
    if (n % kLanes<F> == 0 && !(cap_ > 0) && shift_ == 0) {
      visit<F>(dtype, [&](auto element) {
        using T = typename decltype(element)::Storage;
        fn(element, reinterpret_cast<const T*>(x), n);
      });
      return;
    }
    read_tile<F>(x, dtype, n, buf);
    if (cap_ > 0) softcap_tile<F>(buf, padded<F>(n), cap_, F(spec_.logit_scale));
    if (shift_ != 0) subtract_tile<F>(buf, padded<F>(n), shift_);
    pad_tile<F>(buf, n, -INFINITY);
    fn(Native<F>{}, static_cast<const F*>(buf), padded<F>(n));
  }

  // q' of n columns from j: the probabilities themselves where they need no work, else in ws_.probs; padded with zeros.
  const F* target_probs(int64_t i, int64_t j, int64_t n) const {
    const DType dtype = rows_.probs.dtype;
    const char* q = rows_.probs.row(i) + j * size_of(dtype);
    const bool as_is = n % kLanes<F> == 0 && spec_.label_smoothing == 0 && !weights_.at(j);
    if (as_is && size_of(dtype) == sizeof(F)) return reinterpret_cast<const F*>(q);
    read_tile<F>(q, dtype, n, ws_.probs);
    smooth_probs_tile<F>(ws_.probs, padded<F>(n), weights_.at(j), F(spec_.label_smoothing), V_);
    pad_tile<F>(ws_.probs, n, 0);
    return ws_.probs;
  }

  static double element(const Matrix& m, int64_t i, int64_t j) {
    F lane[kLanes<F>];
    read_tile<F>(m.row(i) + j * size_of(m.dtype), m.dtype, 1, lane);
    return lane[0];
  }

  double z_of(double x) const {
    if (!(cap_ > 0)) return x * double(scale_);
    F lane[kLanes<F>];
    store(lane, broadcast<F>(F(x)));
    softcap_tile<F>(lane, kLanes<F>, cap_, F(spec_.logit_scale));
    return lane[0];
  }

  F target_gradient(const RowStats<double>& s, const Coefficients<double>& cs, double z, int64_t y) const {
    const double p = std::exp((z - s.centre) - s.log_sum);
    double dx = epilogue<double>(cs, p, p > 0 ? z - s.centre : 0, weights_.of(y), 0) - cs.B;
    if (cap_ > 0) dx *= 1 - (z / cap_) * (z / cap_);
    return F(dx);
  }
};

template <class F>
void row_loss(const Rows& rows, const RowOutputs& out) {
  const int64_t N = rows.input.rows, V = rows.input.cols;
  const ClassWeights<F> weights(rows);
  F* loss = static_cast<F*>(out.loss);
  F* stats = static_cast<F*>(out.stats);
  parallel_for(N, V, rows.threads, [&](int64_t begin, int64_t end) {
    Row<F> row(rows, weights, Workspace<F>::get(V));
    for (int64_t i = begin; i < end; ++i) {
      const bool ignored = rows.ignored(i);
      if (ignored && !out.extras) {
        loss[i] = 0;
        for (int k = 0; k < kStats; ++k) stats[k * N + i] = 0;
        continue;
      }
      int64_t* argmax = out.argmax ? out.argmax + i : nullptr;
      const auto state =
          out.extras ? row.template reduce<true, false>(i, argmax) : row.template reduce<false, false>(i, argmax);
      double value;
      RowStats<double> s = finalize(rows.spec, state, row.target(i), V, &value);
      if (ignored) s.log_prob = s.mass = value = 0;
      loss[i] = F(value);
      s.log_sum += s.centre - double(F(s.centre));  // what rounding takes from one, the other keeps
      const double columns[kStats] = {s.centre, s.log_sum, s.log_prob, s.mass, s.entropy};
      for (int k = 0; k < kStats; ++k) stats[k * N + i] = F(columns[k]);
    }
  });
}

template <class F>
void row_grad(const Rows& rows, const void* stats_data, const Vector upstream[4], const Matrix& grad) {
  const int64_t N = rows.input.rows, V = rows.input.cols;
  const ClassWeights<F> weights(rows);
  const F* stats = static_cast<const F*>(stats_data);
  parallel_for(N, V, rows.threads, [&](int64_t begin, int64_t end) {
    Row<F> row(rows, weights, Workspace<F>::get(V));
    for (int64_t i = begin; i < end; ++i) {
      Upstream<double> g{upstream[0].at(i, F(0)), upstream[1].at(i, F(0)), upstream[2].at(i, F(0)),
                         upstream[3].at(i, F(0))};
      if (rows.ignored(i)) g.loss = g.log_prob = 0;
      if (g.loss == 0 && g.lse == 0 && g.log_prob == 0 && g.entropy == 0) {
        std::memset(grad.row(i), 0, size_t(V * size_of(grad.dtype)));
        continue;
      }
      const RowStats<double> s{stats[i], stats[N + i], stats[2 * N + i], stats[3 * N + i], stats[4 * N + i]};
      const auto y = row.target(i);
      Coefficients<double> c = coefficients(rows.spec, s, y.weight, V, g);
      if (rows.ignored(i)) c.B = 0;
      row.template gradient<false>(i, s, c, y.logit, grad.row(i), grad.dtype, false);
    }
  });
}

// What a mean divides by: the summed weights of the rows that count.
template <class F>
double mean_denominator(const Rows& rows, const Vector& token_weight, const ClassWeights<F>& weights) {
  double sum = 0;
  for (int64_t i = 0; i < rows.input.rows; ++i) {
    if (rows.ignored(i)) continue;
    sum += double(token_weight.at(i, F(1))) * (rows.spec.soft ? 1 : weights.of(rows.target[i]));
  }
  return sum;
}

template <class F>
double row_loss_grad(const Rows& rows, const Reduced& r) {
  const int64_t N = rows.input.rows, V = rows.input.cols;
  const ClassWeights<F> weights(rows);
  const double denominator = r.has_normalizer                  ? r.normalizer
                             : r.reduction == Reduction::kMean ? mean_denominator(rows, r.token_weight, weights)
                                                               : 1.0;
  std::vector<double> losses(static_cast<size_t>(N), 0.0);
  parallel_for(N, V, rows.threads, [&](int64_t begin, int64_t end) {
    Row<F> row(rows, weights, Workspace<F>::get(V));
    for (int64_t i = begin; i < end; ++i) {
      if (rows.ignored(i)) {
        if (r.grad.data) std::memset(r.grad.row(i), 0, size_t(V * size_of(r.grad.dtype)));
        continue;
      }
      const auto y = row.target(i);
      const auto state = r.grad.data ? row.template reduce<false, true>(i) : row.template reduce<false, false>(i);
      double value;
      const RowStats<double> s = finalize(rows.spec, state, y, V, &value);
      const double w = r.token_weight.at(i, F(1));
      losses[size_t(i)] = value * w;
      if (!r.grad.data) continue;
      const Coefficients<double> c = coefficients(rows.spec, s, y.weight, V, {r.upstream * w / denominator, 0, 0, 0});
      row.template gradient<true>(i, s, c, y.logit, r.grad.row(i), r.grad.dtype, r.streaming);
    }
    if (r.streaming) stream_fence();
  });
  double loss = 0;
  for (const double v : losses) loss += v;  // one order, whatever the threads did
  return r.reduction == Reduction::kMean || r.has_normalizer ? loss / denominator : loss;
}

template <class F>
void row_states(const Rows& rows, double* states) {
  const ClassWeights<F> weights(rows);
  parallel_for(rows.input.rows, rows.input.cols, rows.threads, [&](int64_t begin, int64_t end) {
    Row<F> row(rows, weights, Workspace<F>::get(rows.input.cols));
    for (int64_t i = begin; i < end; ++i) {
      const RowState<double> s = row.template reduce<true, false>(i);
      const double fields[kStates] = {s.centre, s.sum, s.moment, s.plain, s.mass};
      std::copy(fields, fields + kStates, states + i * kStates);
    }
  });
}

void merge_states(const double* a, const double* b, double* out, int64_t N) {
  const auto state = [](const double* p) { return RowState<double>{p[0], p[1], p[2], p[3], p[4]}; };
  for (int64_t i = 0; i < N * kStates; i += kStates) {
    const RowState<double> s = merge(state(a + i), state(b + i));
    const double fields[kStates] = {s.centre, s.sum, s.moment, s.plain, s.mass};
    std::copy(fields, fields + kStates, out + i);
  }
}

template <class F>
constexpr Kernels kernels_in() {
  return {FASTLOSS_ISA_NAME, row_states<F>, merge_states, row_loss<F>, row_grad<F>, row_loss_grad<F>};
}

}  // namespace

extern const Kernels kernels_float32 = kernels_in<float>();
extern const Kernels kernels_float64 = kernels_in<double>();

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
