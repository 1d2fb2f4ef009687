// How Python describes rows to the native modules: addresses and sizes in, exceptions out.
#pragma once

#include <pybind11/pybind11.h>

#include "rows.h"

namespace fastloss {

inline Matrix matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t row_stride, int dtype) {
  if (rows < 0 || cols < 0) throw std::invalid_argument("a matrix cannot have negative sizes");
  if (dtype < 0 || dtype > int(DType::kFloat16)) throw std::invalid_argument("unknown dtype code");
  if (!data && rows * cols > 0) throw std::invalid_argument("a matrix with elements needs an address");
  return {reinterpret_cast<void*>(data), rows, cols, row_stride, DType(dtype)};
}

inline Vector vector(uintptr_t data, int64_t stride = 1) { return {reinterpret_cast<const void*>(data), stride}; }

// Everything that describes the rows, in the order of rows_fields() in backends/native.py.
inline Rows parse_rows(const pybind11::tuple& t) {
  if (t.size() != 20) throw std::invalid_argument("rows: expected 20 fields");
  // The C API rather than py::cast: a small call spends its time here.
  const auto integer = [&](Py_ssize_t i) { return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i))); };
  const auto real = [&](Py_ssize_t i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(t.ptr(), i)); };
  const auto address = [&](Py_ssize_t i) { return uintptr_t(integer(i)); };
  Rows r;
  r.input = matrix(address(0), integer(1), integer(2), integer(3), int(integer(4)));
  r.target = reinterpret_cast<const int64_t*>(address(5));
  r.picks = integer(6);
  r.weight = vector(address(10));
  r.ignore_index = integer(11);
  r.spec.label_smoothing = real(12);
  r.spec.z_loss = real(13);
  r.spec.softcap = real(14);
  r.spec.logit_scale = real(15);
  const int64_t objective = integer(16);
  r.spec.target_scale = real(17);
  r.spec.beta = real(18);
  r.threads = int(integer(19));
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  if (objective < 0 || objective > int(Objective::kJS)) throw std::invalid_argument("unknown objective");
  r.spec.objective = Objective(objective);
  if (r.spec.indexed() && (r.picks < 0 || (!r.target && r.input.rows * r.picks > 0)))
    throw std::invalid_argument("target: no address");
  if (!r.spec.indexed() || r.spec.listed()) {
    Matrix& dense = r.spec.paired() ? r.teacher : r.probs;
    const int64_t cols = r.spec.listed() ? r.picks : r.input.cols;
    dense = matrix(address(7), r.input.rows, cols, integer(8), int(integer(9)));
  }
  return r;
}

}  // namespace fastloss
