#include "parts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dispatch.h"

namespace fastloss {
namespace {

constexpr int64_t kNoClass = -1;

// The rows as kernels take them: a class of this part has all probability, one of another part is a class of none.
template <class F>
struct Local {
  std::vector<int64_t> target;
  std::vector<F> probs;
  Rows rows;
  int64_t count = 0;  // rows that are not ignored

  explicit Local(const Part& part)
      : target(size_t(part.rows.input.rows)), probs(size_t(part.rows.input.rows)), rows(part.rows) {
    for (int64_t i = 0; i < rows.input.rows; ++i) {
      const int64_t y = part.rows.target[i] - part.start;
      const bool ignored = part.rows.target[i] == part.rows.ignore_index, here = y >= 0 && y < rows.input.cols;
      target[size_t(i)] = ignored ? kNoClass : here ? y : 0;
      probs[size_t(i)] = !ignored && here;
      count += !ignored;
    }
    rows.target = target.data();
    rows.ignore_index = kNoClass;
    rows.spec.objective = Objective::kTopK;
    rows.probs = {probs.data(), rows.input.rows, 1, 1, sizeof(F) == 8 ? DType::kFloat64 : DType::kFloat32};
  }
};

template <class F>
int64_t part_loss_in(const Part& part, F* columns) {
  const Local<F> local(part);
  const int64_t N = part.rows.input.rows;
  std::vector<F> stats(size_t(kStats * N));
  RowOutputs out;
  out.loss = columns + kPartLoss * N;
  out.stats = stats.data();
  kernels(part.rows.input.dtype).row_loss(local.rows, out);
  std::copy_n(stats.data(), 2 * N, columns + kPartCentre * N);
  std::copy_n(stats.data() + 3 * N, N, columns + kPartMass * N);
  return local.count;
}

// A row over all parts, whose logarithms of sums are centre + log_sum.
struct Whole {
  double centre, log_sum, mass, loss;
};

// One row of all parts; `of(part, column)`.
template <class Of>
Whole merge_row(int64_t parts, std::vector<double>& e, Of&& of) {
  double centre = -INFINITY, top = std::numeric_limits<double>::lowest(), sum = 0;
  const auto largest = [](double a, double b) { return a > b || std::isnan(a) ? a : b; };
  for (int64_t r = 0; r < parts; ++r) centre = largest(of(r, kPartCentre), centre);
  const auto nothing = [&](int64_t r) { return of(r, kPartCentre) == -INFINITY; };
  for (int64_t r = 0; r < parts; ++r) {
    e[size_t(r)] = nothing(r) ? -INFINITY : (of(r, kPartCentre) - centre) + of(r, kPartLogSum);
    top = largest(e[size_t(r)], top);
  }
  for (int64_t r = 0; r < parts; ++r) sum += e[size_t(r)] = std::exp(e[size_t(r)] - top);
  Whole whole{centre, top + std::log(sum), 0, 0};
  for (int64_t r = 0; r < parts; ++r) {
    const double mass = of(r, kPartMass);
    if (!nothing(r)) whole.loss += of(r, kPartLoss);
    if (mass == 0) continue;
    // Of a part that has nearly all, the others say more than a difference of what is nearly equal.
    double others = 0;
    for (int64_t s = 0; s < parts; ++s) others += s == r ? 0 : e[size_t(s)];
    others /= e[size_t(r)];
    const double gap = others < 0.5 ? std::log1p(others)
                       : nothing(r) ? INFINITY
                                    : (centre - of(r, kPartCentre)) + (whole.log_sum - of(r, kPartLogSum));
    whole.mass += mass;
    // NaN where there is no class at all: infinity less infinity.
    whole.loss += mass * gap + times(mass, centre - centre);  // NOLINT(misc-redundant-expression)
  }
  return whole;
}

template <class F>
double merge_parts_in(const char* columns, int64_t parts, int64_t stride, int64_t N, F* stats) {
  double sum = 0;
  std::vector<double> e(static_cast<size_t>(parts));
  for (int64_t i = 0; i < N; ++i) {
    const Whole row = merge_row(parts, e, [&](int64_t r, int column) {
      return double(reinterpret_cast<const F*>(columns + r * stride)[column * N + i]);
    });
    const double kept[kStats] = {row.centre, row.log_sum, 0, row.mass, 0};
    for (int k = 0; k < kStats; ++k) stats[k * N + i] = F(kept[k]);
    sum += row.loss;
  }
  return sum;
}

template <class F>
void part_grad_in(const Part& part, const void* stats, double upstream, const Matrix& grad) {
  const Local<F> local(part);
  const F g = F(upstream);
  const Vector four[4] = {{&g, 0}, {}, {}, {}};
  kernels(part.rows.input.dtype).row_grad(local.rows, stats, four, grad);
}

}  // namespace

int64_t part_loss(const Part& part, void* columns) {
  return part.rows.input.dtype == DType::kFloat64 ? part_loss_in(part, static_cast<double*>(columns))
                                                  : part_loss_in(part, static_cast<float*>(columns));
}

double merge_parts(const char* columns, int64_t parts, int64_t stride, int64_t N, DType dtype, void* stats) {
  return dtype == DType::kFloat64 ? merge_parts_in(columns, parts, stride, N, static_cast<double*>(stats))
                                  : merge_parts_in(columns, parts, stride, N, static_cast<float*>(stats));
}

void part_grad(const Part& part, const void* stats, double upstream, const Matrix& grad) {
  return part.rows.input.dtype == DType::kFloat64 ? part_grad_in<double>(part, stats, upstream, grad)
                                                  : part_grad_in<float>(part, stats, upstream, grad);
}

}  // namespace fastloss
