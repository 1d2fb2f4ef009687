// Python's view of the native code: addresses and sizes in, exceptions out. Nothing else happens here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/buffers.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/parts.h"
#include "python.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

// Before anything is written: a class index outside [0, V) that is not ignore_index is the caller's error.
void check_targets(const Rows& r, int64_t V) {
  if (!r.spec.indexed()) return;
  for (int64_t i = 0; i < r.input.rows * r.picks; ++i)
    if (r.target[i] != r.ignore_index && (r.target[i] < 0 || r.target[i] >= V))
      throw py::index_error("target: expected class indices in [0, " + std::to_string(V) + ") or ignore_index (" +
                            std::to_string(r.ignore_index) + "), but Target " + std::to_string(r.target[i]) +
                            " is out of bounds.");
}
void check_targets(const Rows& r) { check_targets(r, r.input.cols); }

void row_loss(const py::tuple& rows_tuple, uintptr_t loss, uintptr_t stats, uintptr_t argmax, uintptr_t rank,
              bool extras, bool whole) {
  const Rows rows = parse_rows(rows_tuple);
  check_targets(rows);
  const RowOutputs out{reinterpret_cast<void*>(loss),
                       reinterpret_cast<void*>(stats),
                       reinterpret_cast<int64_t*>(argmax),
                       reinterpret_cast<int64_t*>(rank),
                       extras,
                       whole};
  const py::gil_scoped_release release;
  kernels(rows.input.dtype).row_loss(rows, out);
}

void row_grad(const py::tuple& rows_tuple, uintptr_t stats, const std::vector<std::pair<uintptr_t, int64_t>>& upstream,
              const GradFields& grad) {
  const Rows rows = parse_rows(rows_tuple);
  check_targets(rows);
  if (upstream.size() != 4) throw std::invalid_argument("upstream: expected four vectors");
  Vector g[4];
  for (size_t i = 0; i < 4; ++i) g[i] = vector(upstream[i].first, upstream[i].second);
  const Matrix dx = parse_grad(rows, grad);
  const py::gil_scoped_release release;
  kernels(rows.input.dtype).row_grad(rows, reinterpret_cast<const void*>(stats), g, dx);
}

double row_loss_grad(const py::tuple& rows_tuple, int reduction, uintptr_t token_weight,
                     std::optional<double> normalizer, double upstream, const std::optional<GradFields>& grad,
                     bool streaming) {
  const Rows rows = parse_rows(rows_tuple);
  check_targets(rows);
  Reduced r;
  r.reduction = Reduction(reduction);
  r.token_weight = vector(token_weight);
  r.has_normalizer = normalizer.has_value();
  r.normalizer = normalizer.value_or(0);
  r.upstream = upstream;
  r.streaming = streaming;
  if (grad) r.grad = parse_grad(rows, *grad);
  const py::gil_scoped_release release;
  return kernels(rows.input.dtype).row_loss_grad(rows, r);
}

void row_states(const py::tuple& rows_tuple, uintptr_t states) {
  const Rows rows = parse_rows(rows_tuple);
  const py::gil_scoped_release release;
  kernels(rows.input.dtype).row_states(rows, reinterpret_cast<double*>(states));
}

void merge_states(uintptr_t a, uintptr_t b, uintptr_t out, int64_t N) {
  kernels(DType::kFloat64)
      .merge_states(reinterpret_cast<const double*>(a), reinterpret_cast<const double*>(b),
                    reinterpret_cast<double*>(out), N);
}

Part part(const py::tuple& rows_tuple, int64_t start) {
  const Part p{parse_rows(rows_tuple), start};
  const Spec& spec = p.rows.spec;
  if (spec.objective != Objective::kIndex || p.rows.weight.present() || spec.label_smoothing > 0 || spec.z_loss != 0)
    throw std::invalid_argument("part: expected class indices, without class weights, smoothing and z-loss");
  return p;
}

int64_t part_loss(const py::tuple& rows_tuple, int64_t start, int64_t vocab_size, uintptr_t columns) {
  const Part p = part(rows_tuple, start);
  check_targets(p.rows, vocab_size);
  const py::gil_scoped_release release;
  return part_loss(p, reinterpret_cast<void*>(columns));
}

double merge_parts(uintptr_t columns, int64_t parts, int64_t stride, int64_t N, int dtype, uintptr_t stats) {
  const Matrix whole = matrix(stats, kStats, N, N, dtype);  // checks the sizes
  return merge_parts(reinterpret_cast<const char*>(columns), parts, stride, N, whole.dtype, whole.data);
}

void part_grad(const py::tuple& rows_tuple, int64_t start, uintptr_t stats, double upstream, const GradFields& grad) {
  const Part p = part(rows_tuple, start);
  const Matrix dx = parse_grad(p.rows, grad);
  const py::gil_scoped_release release;
  part_grad(p, reinterpret_cast<const void*>(stats), upstream, dx);
}

// (address, rows, columns, row stride, column stride, dtype code).
using StridedFields = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int>;

Strided strided(const StridedFields& t) {
  const auto [address, rows, cols, row_stride, col_stride, code] = t;
  const Matrix m = matrix(address, rows, cols, row_stride, code);
  return {m.data, m.rows, m.cols, row_stride, col_stride, m.dtype};
}

void matmul(const StridedFields& a, const StridedFields& b, uintptr_t out, int64_t stride, uintptr_t start, bool add,
            int threads) {
  const Product p{strided(a), strided(b), reinterpret_cast<void*>(out), stride, reinterpret_cast<const void*>(start),
                  add,        threads};
  if (p.a.cols != p.b.rows) throw std::invalid_argument("matmul: a's columns are not b's rows");
  if ((p.a.dtype == DType::kFloat64) != (p.b.dtype == DType::kFloat64))
    throw std::invalid_argument("matmul: float64 goes with float64");
  if (p.a.rows == 0 || p.b.cols == 0) return;
  if (!out || stride < p.b.cols) throw std::invalid_argument("matmul: out has no address, or its rows overlap");
  const py::gil_scoped_release release;
  kernels(p.a.dtype).matmul(p);
}

void head_loss(const py::tuple& rows_tuple, const StridedFields& hidden, const StridedFields& weight, uintptr_t bias,
               uintptr_t loss, uintptr_t stats, uintptr_t argmax, uintptr_t listed) {
  const Rows rows = parse_rows(rows_tuple);
  const Head head{strided(hidden), strided(weight), reinterpret_cast<const void*>(bias)};
  if (head.hidden.cols != head.weight.rows || head.hidden.rows != rows.input.rows ||
      head.weight.cols != rows.input.cols)
    throw std::invalid_argument("head_loss: hidden, weight and rows do not fit each other");
  if (rows.spec.objective != Objective::kIndex && rows.spec.objective != Objective::kTopK)
    throw std::invalid_argument("head_loss: expected class indices, or listed classes");
  for (const DType dtype : {head.hidden.dtype, head.weight.dtype})
    if ((dtype == DType::kFloat64) != (rows.input.dtype == DType::kFloat64))
      throw std::invalid_argument("head_loss: float64 goes with float64");
  check_targets(rows);
  RowOutputs out{reinterpret_cast<void*>(loss), reinterpret_cast<void*>(stats), reinterpret_cast<int64_t*>(argmax)};
  out.extras = argmax != 0;
  out.listed = reinterpret_cast<void*>(listed);
  const py::gil_scoped_release release;
  kernels(rows.input.dtype).head_loss(rows, head, out);
}

// Recycled memory as a Python buffer; it goes back to the cache when the last tensor over it is gone.
struct PyBuffer {
  Buffer buffer;
  explicit PyBuffer(size_t bytes) : buffer(acquire_buffer(bytes)) {}
  PyBuffer(const PyBuffer&) = delete;
  ~PyBuffer() { release_buffer(buffer); }
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "fastloss's compiled kernels; use them through fastloss.backends.native.";
  m.def("row_states", &row_states);
  m.def("merge_states", &merge_states);
  m.def("row_loss", &row_loss);
  m.def("row_grad", &row_grad);
  m.def("row_loss_grad", &row_loss_grad);
  m.def("part_loss", py::overload_cast<const py::tuple&, int64_t, int64_t, uintptr_t>(&part_loss));
  m.def("merge_parts", py::overload_cast<uintptr_t, int64_t, int64_t, int64_t, int, uintptr_t>(&merge_parts));
  m.def("part_grad", py::overload_cast<const py::tuple&, int64_t, uintptr_t, double, const GradFields&>(&part_grad));
  m.def("matmul", &matmul);
  m.def("head_loss", &head_loss);
  m.def("available_isas", &available_isas);
  m.def("current_isa", &current_isa);
  m.def("use_isa", &use_isa);
  m.def("team_kind", &team_kind);
  m.def("empty_cache", &empty_cache);
  m.attr("version") = FASTLOSS_VERSION;
  m.attr("compiler") = FASTLOSS_COMPILER;
  m.attr("compiled_isas") = FASTLOSS_COMPILED_ISAS;
  py::class_<PyBuffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_property_readonly("recycled", [](const PyBuffer& b) { return b.buffer.recycled; })
      .def_buffer(
          [](PyBuffer& b) { return py::buffer_info(static_cast<char*>(b.buffer.data), ssize_t(b.buffer.bytes)); });
}
