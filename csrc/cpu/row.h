// One row of logits against its target. It is read from memory once, tile by tile, into its state; with a gradient to
// write, the tiles' exponentials stay in a per-thread row (L2), and the second pass scales them on their way out.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "tiles.h"
#include "workspace.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// A centre may lie this far below the maximum, in units of z: exponentials stay far from overflow, sums lose nothing.
constexpr double kSlack = 8;
constexpr int64_t kGlance = 256;

template <class F>
using Native = std::conditional_t<sizeof(F) == 8, Float64, Float32>;

// Where a row's gradient goes; `streaming`: past the caches.
struct Gradient {
  char* row;
  DType dtype;
  bool streaming;
};

// Statistics as they are kept, in F; what rounding takes from a centre, its log-sum keeps.
template <class F>
struct Columns {
  F* at;
  int64_t N;

  RowStats<double> row(int64_t i) const { return {at[i], at[N + i], at[2 * N + i], at[3 * N + i], at[4 * N + i]}; }
  PairStats<double> pair(int64_t i) const { return {at[i], at[N + i], at[2 * N + i], at[3 * N + i], at[4 * N + i]}; }
  void put(int64_t i, const RowStats<double>& s) const {
    put(i, {s.centre, s.log_sum + lost(s.centre), s.log_prob, s.mass, s.entropy});
  }
  void put(int64_t i, const PairStats<double>& s) const {
    const double target_log_sum = s.target_log_sum + lost(s.target_centre);
    put(i, {s.centre, s.log_sum + lost(s.centre), s.target_centre, target_log_sum, s.tilt});
  }

 private:
  static double lost(double centre) { return std::isfinite(centre) ? centre - double(F(centre)) : 0; }
  void put(int64_t i, const double (&columns)[kStats]) const {
    for (int k = 0; k < kStats; ++k) at[k * N + i] = F(columns[k]);
  }
};

// Row i's loss and statistics into the outputs; of an ignored row they must be zero.
template <class F>
inline void write_row(const Rows& rows, int64_t i, double loss, RowStats<double> s, const RowOutputs& out,
                      const Columns<F>& stats) {
  static_cast<F*>(out.loss)[i] = F(loss);
  stats.put(i, s);
  if (!rows.ignored(i)) return;  // these were not written
  if (out.argmax) out.argmax[i] = 0;
  if (out.rank) out.rank[i] = 0;
}

// fn(first column, columns, tile) over V columns: whole vectors, then what is left.
template <class F, class Fn>
inline void for_tiles(int64_t V, Fn&& fn) {
  for (int64_t j = 0, t = 0, n; j < V; j += n, ++t) {
    n = std::min(kTile, V - j);
    if (n > kLanes<F>) n -= n % kLanes<F>;
    fn(j, n, t);
  }
}

template <class F>
class Row {
 public:
  // `first`: the class of the first column, where rows are a slice of longer ones.
  Row(const Rows& rows, const ClassWeights<F>& weights, Workspace<F>& ws, int64_t first = 0)
      : rows_(rows),
        weights_(weights),
        first_(first),
        ws_(ws),
        spec_(rows.spec),
        V_(rows.input.cols),
        cap_(F(spec_.softcap)),
        // Without a softcap the scale rides along in the exponential, and a tile holds x.
        scale_(cap_ > 0 ? F(1) : F(spec_.logit_scale)) {}

  // Before anything else of row i: what its target lists, which its gradient may overwrite. `listed`: the logits of
  // that, where the row is not there to be read.
  void begin(int64_t i, const F* listed = nullptr) {
    picks_.clear();
    if (!spec_.indexed() || rows_.ignored(i)) return;
    for (int64_t k = i * rows_.picks; k < (i + 1) * rows_.picks; ++k) {
      const int64_t j = rows_.target[k];
      if (j == rows_.ignore_index) continue;
      const double z = z_of(listed ? double(listed[k - i * rows_.picks]) : element(rows_.input, i, j));
      const double q = spec_.listed() ? probs_of(i, k - i * rows_.picks) * weights_.of(j) : 1;
      picks_.push_back({j, z, q});
    }
    if (picks_.size() > 1) join_equal_picks();
  }

  // The state of row i. Keep: leave in the workspace what gradient<true>() needs. `before`: the largest logit of slices
  // that came before this one, about which their states are.
  template <bool Moment, bool Keep>
  RowState<double> reduce(int64_t i, int64_t* argmax = nullptr, F before = -INFINITY) {
    RowState<double> state;
    shift_ = 0;
    if (!try_reduce<Moment, Keep>(i, argmax, before, state)) {
      shift_ = row_max(i);
      state = {};
      try_reduce<Moment, Keep>(i, argmax, -INFINITY, state);
    }
    if (state.sum > 0 && std::isfinite(peak_.logit) && largest() > before) sharpen_peak(state);
    state.centre += shift_ * double(scale_);
    return state;
  }

  // The largest logit of the row last reduced; with a softcap, after it.
  F largest() const { return peak_.logit + shift_; }

  // The loss of row i, which is not ignored. Keep: gradient() may follow.
  template <bool Keep>
  double loss(int64_t i) {
    begin(i);
    const RowState<double> state = reduce<false, Keep>(i);
    double value;
    if (spec_.objective == Objective::kTopKTail)
      tail_ = finish_tail(state, &value);
    else
      stats_ = finish(state, &value);
    return value;
  }
  void gradient(int64_t i, const Upstream<double>& g, const Gradient& to) {
    if (spec_.objective == Objective::kTopKTail)
      gradient_tail(i, g.loss, to);
    else
      gradient<true>(i, stats_, g, to);
  }

  RowStats<double> finish(const RowState<double>& state, double* loss) const {
    return finalize(spec_, state, target(state.centre), V_, loss);
  }

  // The statistics of the last loss(), as row_loss() writes them. Of a tail they are its centre, log-sum and
  // log-probability, and the log-sum and centre of all, of which the log-sum is what rounding takes from the centre.
  RowStats<double> stats() const {
    if (spec_.objective != Objective::kTopKTail) return stats_;
    const double centre = std::isfinite(tail_.lse) ? double(F(tail_.lse)) : tail_.lse;
    return {tail_.centre, tail_.log_sum, tail_.log_prob, tail_.lse == centre ? 0 : tail_.lse - centre, centre};
  }

  // dx of row i, from what reduce<.., Keep> left (Kept), or from the logits again.
  template <bool Kept>
  void gradient(int64_t i, const RowStats<double>& s, const Upstream<double>& g, const Gradient& to) {
    const double w = picks_.empty() ? 1 : weights_.of(picks_[0].column);
    const Coefficients<double> cs = scaled(coefficients(spec_, s, w, V_, g));
    spread<Kept>(i, s, cs, to);
    for (const Pick& y : picks_) {
      const double p = std::exp((y.logit - s.centre) - s.log_sum);
      const double dz = epilogue<double>(cs, p, p > 0 ? y.logit - s.centre : 0, weights_.of(y.column), 0);
      put(y, dz - cs.B * y.weight, to);
    }
  }

  // How many logits are larger than the target's; 0 where there is none.
  int64_t rank(int64_t i) const {
    if (picks_.empty()) return 0;
    const F x_y = F(element(rows_.input, i, picks_[0].column));
    int64_t count = 0;
    for_tiles<F>(V_, [&](int64_t j, int64_t n, int64_t) {
      read_tile<F>(rows_.input.row(i) + j * size_of(rows_.input.dtype), rows_.input.dtype, n, ws_.tile);
      pad_tile<F>(ws_.tile, n, -INFINITY);
      count += count_above<F>(ws_.tile, padded<F>(n), x_y);
    });
    return count;
  }

 private:
  // What a target lists, each class once: its column, transformed logit, and share.
  struct Pick {
    int64_t column;
    double logit, weight;
  };

  const Rows& rows_;
  const ClassWeights<F>& weights_;
  const int64_t first_;
  Workspace<F>& ws_;
  const Spec& spec_;
  const int64_t V_;
  const F cap_, scale_;
  std::vector<Pick> picks_;
  RowStats<double> stats_ = {};
  TailStats<double> tail_ = {};

  TailStats<double> finish_tail(const RowState<double>& tail, double* loss) const {
    double centre = tail.centre;
    for (const Pick& y : picks_) centre = std::max(centre, y.logit);
    double sum = tail.sum > 0 ? tail.sum * std::exp(tail.centre - centre) : 0;
    for (const Pick& y : picks_) sum += std::exp(y.logit - centre);
    return finalize_tail(spec_, tail, target(centre), centre, std::log(sum), loss);
  }

  void gradient_tail(int64_t i, double g, const Gradient& to) {
    const TailStats<double>& s = tail_;
    spread<true>(i, {s.centre, s.log_sum, 0, 0, 0}, scaled(coefficients(spec_, s, g)), to);
    const double A = s.mass + 2 * spec_.z_loss * s.lse;
    for (const Pick& y : picks_) put(y, g * spec_.logit_scale * (A * std::exp(y.logit - s.lse) - y.weight), to);
  }

  Coefficients<double> scaled(Coefficients<double> c) const {
    for (double* v : {&c.A, &c.E, &c.B, &c.C, &c.Q}) *v *= spec_.logit_scale;  // the linear part of phi'
    return c;
  }

  void join_equal_picks() {
    std::sort(picks_.begin(), picks_.end(), [](const Pick& a, const Pick& b) { return a.column < b.column; });
    size_t kept = 0;
    for (size_t k = 1; k < picks_.size(); ++k)
      if (picks_[k].column == picks_[kept].column)
        picks_[kept].weight += picks_[k].weight;
      else
        picks_[++kept] = picks_[k];
    picks_.resize(kept + 1);
  }

  RowTarget<double> target(double centre) const {
    RowTarget<double> y;
    y.weight_sum = weights_.sum;
    if (picks_.empty()) return y;
    y.logit = picks_[0].logit;
    y.weight = weights_.of(picks_[0].column);
    if (spec_.listed())
      for (const Pick& k : picks_) y.plain += times(k.weight, k.logit - centre), y.mass += k.weight;
    return y;
  }

  void put(const Pick& y, double dz, const Gradient& to) const {
    if (cap_ > 0) dz *= 1 - (y.logit / cap_) * (y.logit / cap_);
    const F dx = F(dz);
    write_tile<F>(&dx, F(1), to.row + y.column * size_of(to.dtype), to.dtype, 1, false);
  }

  // The gradient but for what is picked.
  template <bool Kept>
  void spread(int64_t i, const RowStats<double>& s, const Coefficients<double>& cs, const Gradient& to) {
    if (!Kept) shift_ = Centre<F>(F(s.centre / scale_), scale_).exact ? F(0) : F(s.centre / scale_);
    const double origin = s.centre - shift_ * double(scale_);  // s.centre in the units of the tiles
    // Statistics in float32 of logits near 1e10: the centre's rounding is in log_sum, and exponentials around it
    // vanish.
    const double anchor = std::abs(s.log_sum) > 64 ? origin + s.log_sum : origin;
    const Centre<F> centre(F(anchor / scale_), scale_);
    const F k = F(std::exp((centre.value - origin) - s.log_sum)), m = F(origin);
    const Coefficients<F> cf{F(cs.A + times(cs.E, m - origin)), F(cs.E), F(cs.B), F(cs.C), F(cs.Q)};
    for_tiles<F>(V_, [&](int64_t j, int64_t n, int64_t t) {
      F *work = ws_.row + j, factor = 1;
      const Operands<F> operands{weights_.at(j), spec_.soft() ? target_probs(i, j, n) : nullptr, m, scale_, cap_,
                                 shift_};
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
      write_tile<F>(work, factor, to.row + j * size_of(to.dtype), to.dtype, n, to.streaming);
    });
  }

  struct Peak {
    F logit;
    Centre<F> centre;
  };
  Peak peak_{-INFINITY, Centre<F>(0, 1)};  // the row's largest logit, and what its exponential was relative to
  F shift_ = 0;  // taken from a row's logits before anything else when they are too large for Centre's arithmetic

  // False where the row must be shifted first. `m`: a first guess of the largest logit.
  template <bool Moment, bool Keep>
  bool try_reduce(int64_t i, int64_t* argmax, F m, RowState<double>& state) {
    Centre<F> centre(m > -INFINITY ? m : 0, scale_);
    peak_ = {-INFINITY, centre};
    if (argmax) *argmax = 0;
    const bool keep_z = Keep && cap_ > 0;
    bool near = centre.exact;
    for_tiles<F>(V_, [&](int64_t j, int64_t n, int64_t t) {
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
        if (spec_.soft() || spec_.label_smoothing > 0) {
          const F at = F(centre.value);
          const auto plain =
              tile_plain<E, F>(z, np, at, scale_, {spec_.soft() ? target_probs(i, j, n) : weights_.at(first_ + j), n});
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
    for_tiles<F>(V_, [&](int64_t j, int64_t n, int64_t) {
      with_logits(i, j, n, ws_.tile, [&](auto element, const auto* z, int64_t np) {
        m = std::max(m, tile_max<decltype(element), F>(z, np));
      });
    });
    return m;
  }

  // fn(element type, z, padded columns) on the logits where they lie, or in buf when they need work or padding (-inf).
  template <class Fn>
  void with_logits(int64_t i, int64_t j, int64_t n, F* buf, Fn&& fn) const {
    const DType dtype = rows_.input.dtype;
    const char* x = rows_.input.row(i) + j * size_of(dtype);
    if (n % kLanes<F> == 0 && !(cap_ > 0) && shift_ == 0 && spec_.objective != Objective::kTopKTail) {
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
    if (spec_.objective == Objective::kTopKTail)  // the state is the others'
      for (const Pick& y : picks_)
        if (y.column >= j && y.column < j + n) buf[y.column - j] = -INFINITY;
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

  double probs_of(int64_t i, int64_t k) const { return static_cast<const F*>(rows_.probs.data)[i * rows_.picks + k]; }
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
