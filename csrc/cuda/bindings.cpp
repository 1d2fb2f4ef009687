// Python's view of the CUDA kernels: addresses and sizes in, exceptions out. Nothing else happens here.
#include <pybind11/pybind11.h>

#include "../python.h"
#include "launch.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

// The fields of an upstream, in the order of _upstream_fields() in backends/cuda.py.
Upstreams parse_upstream(const py::tuple& t) {
  if (t.size() != 11) throw std::invalid_argument("upstream: expected 11 fields");
  const auto field = [&](size_t i) { return t[i].cast<int64_t>(); };
  Upstreams u;
  u.loss = t[0].cast<double>();
  u.losses = vector(uintptr_t(field(1)), field(2));
  u.lse = vector(uintptr_t(field(3)), field(4));
  u.log_prob = vector(uintptr_t(field(5)), field(6));
  u.entropy = vector(uintptr_t(field(7)), field(8));
  u.token_weight = vector(uintptr_t(field(9)));
  u.denominator = reinterpret_cast<const void*>(field(10));
  return u;
}

DType compute_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

Stream stream(const std::pair<int, uintptr_t>& s) { return {s.first, s.second}; }
using PyStream = std::pair<int, uintptr_t>;

// Rows of which nothing is known but what decides how they are cut.
Rows rows_like(int64_t V, int dtype, int objective, int64_t picks) {
  Rows rows;
  rows.input = {nullptr, 0, V, V, DType(dtype)};
  rows.spec.objective = Objective(objective);
  rows.picks = picks;
  return rows;
}

void row_stats(const py::tuple& rows, uintptr_t states, uintptr_t parts, uintptr_t loss, uintptr_t stats,
               uintptr_t argmax, uintptr_t rank, bool whole, const PyStream& on) {
  StatsArgs args;
  args.mixed = whole;  // of which these rows are a part: what is left is the second round
  args.rows = parse_rows(rows);
  args.loss = reinterpret_cast<void*>(loss);
  args.stats = reinterpret_cast<void*>(stats);
  args.argmax = reinterpret_cast<int64_t*>(argmax);
  args.rank = reinterpret_cast<int64_t*>(rank);
  launch_row_stats(args, reinterpret_cast<void*>(states), reinterpret_cast<int32_t*>(parts), stream(on));
}

void row_grad(const py::tuple& rows, uintptr_t stats, const py::tuple& upstream, bool unless_one,
              const GradFields& grad, const PyStream& on) {
  GradArgs args;
  args.rows = parse_rows(rows);
  args.stats = reinterpret_cast<const void*>(stats);
  args.upstream = parse_upstream(upstream);
  args.upstream.unless_one = unless_one;
  args.grad = parse_grad(args.rows, grad);
  launch_row_grad(args, stream(on));
}

void row_loss_grad(const py::tuple& rows, const py::tuple& upstream, bool unless_one, uintptr_t loss,
                   const GradFields& grad, const PyStream& on) {
  LossGradArgs args;
  args.rows = parse_rows(rows);
  args.upstream = parse_upstream(upstream);
  args.upstream.unless_one = unless_one;
  args.loss = reinterpret_cast<void*>(loss);
  args.grad = parse_grad(args.rows, grad);
  launch_row_loss_grad(args, stream(on));
}

void denominator(const py::tuple& rows, uintptr_t token_weight, uintptr_t out, const PyStream& on) {
  DenominatorArgs args;
  args.rows = parse_rows(rows);
  args.token_weight = vector(token_weight);
  args.out = reinterpret_cast<void*>(out);
  launch_denominator(args, stream(on));
}

void total(uintptr_t loss, int64_t N, int dtype, uintptr_t token_weight, uintptr_t denominator, uintptr_t out,
           int out_dtype, const PyStream& on) {
  TotalArgs args;
  args.loss = reinterpret_cast<const void*>(loss);
  args.N = N;
  args.token_weight = vector(token_weight);
  args.denominator = reinterpret_cast<const void*>(denominator);
  args.out = reinterpret_cast<void*>(out);
  args.out_dtype = DType(out_dtype);
  launch_total(args, compute_dtype(DType(dtype)), stream(on));
}

void rescale(const GradFields& grad, int64_t rows, int64_t cols, int dtype, uintptr_t upstream, const PyStream& on) {
  const auto [address, row_stride, group, group_stride] = grad;
  launch_rescale(
      {matrix(address, rows, cols, row_stride, dtype, group, group_stride), reinterpret_cast<const void*>(upstream)},
      stream(on));
}

}  // namespace

PYBIND11_MODULE(FASTLOSS_MODULE, m) {
  m.doc() = "fastloss's CUDA kernels; use them through fastloss.backends.cuda.";
  m.def("slices", [](int64_t V, int dtype, int objective, int64_t picks) {
    return states_cut(rows_like(V, dtype, objective, picks)).slices;
  });
  m.def("chip_slices", [](int device, int64_t V, int dtype, int objective, int64_t picks) {
    return chip_cut(device, rows_like(V, dtype, objective, picks)).slices;
  });
  m.def("row_stats", &row_stats);
  m.def("row_grad", &row_grad);
  m.def("row_loss_grad", &row_loss_grad);
  m.def("denominator", &denominator);
  m.def("total", &total);
  m.def("rescale", &rescale);
  m.def("cannot_run", [](int device) -> py::object {
    const std::string why = cannot_run(device);
    return why.empty() ? py::object(py::none()) : py::object(py::str(why));
  });
  m.def("driver_report", &driver_report);
  m.attr("architectures") = FASTLOSS_CUDA_ARCHITECTURES;
#if defined(FASTLOSS_CUDA_ON_HOST)
  m.attr("device_type") = "cpu";
#else
  m.attr("device_type") = "cuda";
#endif
}
