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
  if (t.size() != 16) throw std::invalid_argument("rows: expected 16 fields");
  // The C API rather than py::cast: a small call spends its time here.
  const auto integer = [&](Py_ssize_t i) { return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i))); };
  const auto real = [&](Py_ssize_t i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(t.ptr(), i)); };
  const auto address = [&](Py_ssize_t i) { return uintptr_t(integer(i)); };
  Rows r;
  r.input = matrix(address(0), integer(1), integer(2), integer(3), int(integer(4)));
  r.spec.soft = integer(5) != 0;
  if (r.spec.soft)
    r.probs = matrix(address(6), r.input.rows, r.input.cols, integer(7), int(integer(8)));
  else
    r.target = reinterpret_cast<const int64_t*>(address(6));
  r.weight = vector(address(9));
  r.ignore_index = integer(10);
  r.spec.label_smoothing = real(11);
  r.spec.z_loss = real(12);
  r.spec.softcap = real(13);
  r.spec.logit_scale = real(14);
  r.threads = int(integer(15));
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  if (!r.spec.soft && !r.target && r.input.rows > 0) throw std::invalid_argument("target: no address");
  return r;
}

}  // namespace fastloss
