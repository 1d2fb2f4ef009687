// How Python describes rows to the native modules: addresses and sizes in, exceptions out.
#pragma once

#include <pybind11/pybind11.h>

#include <tuple>

#include "rows.h"

namespace fastloss {

// `group` 0: rows at one stride.
inline Matrix matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t row_stride, int dtype, int64_t group = 0,
                     int64_t group_stride = 0) {
  if (rows < 0 || cols < 0) throw std::invalid_argument("a matrix cannot have negative sizes");
  if (dtype < 0 || dtype > int(DType::kFloat16)) throw std::invalid_argument("unknown dtype code");
  if (!data && rows * cols > 0) throw std::invalid_argument("a matrix with elements needs an address");
  if (group < 0) throw std::invalid_argument("a group cannot have a negative number of rows");
  return {reinterpret_cast<void*>(data), rows, cols, row_stride, DType(dtype), group ? group : kOneGroup, group_stride};
}

inline Vector vector(uintptr_t data, int64_t stride = 1) { return {reinterpret_cast<const void*>(data), stride}; }

// Everything that describes the rows, in the order of rows_fields() in backends/native.py.
inline Rows parse_rows(const pybind11::tuple& t) {
  if (t.size() != 24) throw std::invalid_argument("rows: expected 24 fields");
  // The C API rather than py::cast: a small call spends its time here.
  const auto integer = [&](Py_ssize_t i) { return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i))); };
  const auto real = [&](Py_ssize_t i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(t.ptr(), i)); };
  const auto address = [&](Py_ssize_t i) { return uintptr_t(integer(i)); };
  Rows r;
  r.input = matrix(address(0), integer(1), integer(2), integer(3), int(integer(6)), integer(4), integer(5));
  r.target = reinterpret_cast<const int64_t*>(address(7));
  r.picks = integer(8);
  r.weight = vector(address(14));
  r.ignore_index = integer(15);
  r.spec.label_smoothing = real(16);
  r.spec.z_loss = real(17);
  r.spec.softcap = real(18);
  r.spec.logit_scale = real(19);
  const int64_t objective = integer(20);
  r.spec.target_scale = real(21);
  r.spec.beta = real(22);
  r.threads = int(integer(23));
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  if (objective < 0 || objective > int(Objective::kJS)) throw std::invalid_argument("unknown objective");
  r.spec.objective = Objective(objective);
  if (r.spec.indexed() && (r.picks < 0 || (!r.target && r.input.rows * r.picks > 0)))
    throw std::invalid_argument("target: no address");
  if (!r.spec.indexed() || r.spec.listed()) {
    Matrix& dense = r.spec.paired() ? r.teacher : r.probs;
    const int64_t cols = r.spec.listed() ? r.picks : r.input.cols;
    dense = matrix(address(9), r.input.rows, cols, integer(10), int(integer(13)), integer(11), integer(12));
  }
  return r;
}

// A gradient beside the rows' logits: (address, row stride, group, distance of groups), `lines` in backends/native.py.
using GradFields = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

inline Matrix parse_grad(const Rows& rows, const GradFields& fields) {
  const auto [address, row_stride, group, group_stride] = fields;
  const Matrix& x = rows.input;
  return matrix(address, x.rows, x.cols, row_stride, int(x.dtype), group, group_stride);
}

}  // namespace fastloss
