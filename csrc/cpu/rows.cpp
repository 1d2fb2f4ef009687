// The kernels of csrc/cpu/rows.h: rows go to threads; what is done with each is row.h's, or with target logits
// pair.h's.
#include "rows.h"

#include <cmath>
#include <vector>

#include "head.h"
#include "matmul.h"
#include "pair.h"
#include "parallel.h"
#include "row.h"
#include "workspace.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {
namespace {

template <class F>
void write_zeros(const Matrix& grad, int64_t i) {
  std::memset(grad.row(i), 0, size_t(grad.cols * size_of(grad.dtype)));
}

// fn(row of the class that computes this objective's, first row, last row) on every thread.
template <class F, class Fn>
void for_rows(const Rows& rows, const ClassWeights<F>& weights, Fn&& fn) {
  const int64_t V = rows.input.cols;
  parallel_for(rows.input.rows, V, rows.threads, [&](int64_t begin, int64_t end) {
    if (rows.spec.paired()) {
      Pair<F> pair(rows, Workspace<F>::get(V, true));
      fn(pair, begin, end);
    } else {
      Row<F> row(rows, weights, Workspace<F>::get(V, false));
      fn(row, begin, end);
    }
  });
}

// Loss and statistics of a row that is not ignored.
template <class F>
RowStats<double> evaluate(Row<F>& row, int64_t i, const RowOutputs& out, double* loss) {
  if (!out.extras) {
    *loss = row.template loss<false>(i);
    return row.stats();
  }
  row.begin(i);
  const RowStats<double> s =
      row.finish(row.template reduce<true, false>(i, out.argmax ? out.argmax + i : nullptr), loss);
  if (out.rank) out.rank[i] = row.rank(i);
  return s;
}
template <class F>
void row_loss_of(Row<F>& row, int64_t i, const Rows& rows, const RowOutputs& out, const Columns<F>& stats) {
  double value = 0;
  RowStats<double> s = {};
  if (!rows.ignored(i)) s = evaluate(row, i, out, &value);
  write_row(rows, i, value, s, out, stats);
}
template <class F>
void row_loss_of(Pair<F>& pair, int64_t i, const Rows&, const RowOutputs& out, const Columns<F>& stats) {
  const double value = out.whole ? pair.loss_within(i, stats.pair(i)) : pair.template loss<false>(i);
  static_cast<F*>(out.loss)[i] = F(value);
  stats.put(i, pair.stats());
}

template <class F>
void row_loss(const Rows& rows, const RowOutputs& out) {
  const ClassWeights<F> weights(rows);
  const Columns<F> stats{static_cast<F*>(out.stats), rows.input.rows};
  for_rows<F>(rows, weights, [&](auto& row, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row_loss_of(row, i, rows, out, stats);
  });
}

// The gradient from the statistics; where they do not say enough, from the logits' state again.
template <class F>
void gradient_of(Row<F>& row, int64_t i, const Rows& rows, const Columns<const F>& stats, const Upstream<double>& g,
                 const Gradient& to) {
  if (rows.spec.objective == Objective::kTopKTail) {
    row.template loss<true>(i);
    return row.gradient(i, g, to);
  }
  row.begin(i);
  row.template gradient<false>(i, stats.row(i), g, to);
}
template <class F>
void gradient_of(Pair<F>& pair, int64_t i, const Rows&, const Columns<const F>& stats, const Upstream<double>& g,
                 const Gradient& to) {
  pair.gradient(i, stats.pair(i), g, to);
}

template <class F>
void row_grad(const Rows& rows, const void* stats_data, const Vector upstream[4], const Matrix& grad) {
  const ClassWeights<F> weights(rows);
  const Columns<const F> stats{static_cast<const F*>(stats_data), rows.input.rows};
  for_rows<F>(rows, weights, [&](auto& row, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Upstream<double> g{upstream[0].at(i, F(0)), upstream[1].at(i, F(0)), upstream[2].at(i, F(0)),
                         upstream[3].at(i, F(0))};
      if (rows.ignored(i)) g = {};
      if (g.loss == 0 && g.lse == 0 && g.log_prob == 0 && g.entropy == 0)
        write_zeros<F>(grad, i);
      else
        gradient_of(row, i, rows, stats, g, {grad.row(i), grad.dtype, false});
    }
  });
}

// What a mean divides by: the summed weights of the rows that count.
template <class F>
double mean_denominator(const Rows& rows, const Vector& token_weight, const ClassWeights<F>& weights) {
  const bool weighted = rows.spec.objective == Objective::kIndex;
  double sum = 0;
  for (int64_t i = 0; i < rows.input.rows; ++i)
    if (!rows.ignored(i)) sum += double(token_weight.at(i, F(1))) * (weighted ? weights.of(rows.target[i]) : 1);
  return sum;
}

template <class F>
double row_loss_grad(const Rows& rows, const Reduced& r) {
  const ClassWeights<F> weights(rows);
  const double denominator = r.has_normalizer                  ? r.normalizer
                             : r.reduction == Reduction::kMean ? mean_denominator(rows, r.token_weight, weights)
                                                               : 1.0;
  std::vector<double> losses(static_cast<size_t>(rows.input.rows), 0.0);
  for_rows<F>(rows, weights, [&](auto& row, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double w = r.token_weight.at(i, F(1));
      if (rows.ignored(i) || w == 0) {
        if (r.grad.data) write_zeros<F>(r.grad, i);
      } else if (r.grad.data) {
        const double g = r.upstream * w / denominator;
        losses[size_t(i)] = w * row.template loss<true>(i);
        if (g == 0)  // zero times a NaN would be one
          write_zeros<F>(r.grad, i);
        else
          row.gradient(i, {g, 0, 0, 0}, {r.grad.row(i), r.grad.dtype, r.streaming});
      } else {
        losses[size_t(i)] = w * row.template loss<false>(i);
      }
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
    Row<F> row(rows, weights, Workspace<F>::get(rows.input.cols, false));
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
constexpr Kernels kernels_in() noexcept {
  return {FASTLOSS_ISA_NAME, row_states<F>,    merge_states, row_loss<F>,
          row_grad<F>,       row_loss_grad<F>, matmul<F>,    head_loss<F>};
}

}  // namespace

extern const Kernels kernels_float32 = kernels_in<float>();
extern const Kernels kernels_float64 = kernels_in<double>();

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
