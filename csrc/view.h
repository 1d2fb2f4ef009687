// What crosses the language boundary: raw pointers with the shape, stride and dtype that make them safe to use.
// Plain data only, so that every translation unit, whatever its instruction set, agrees on it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTLOSS_HD __host__ __device__
#else
#define FASTLOSS_HD
#endif

namespace fastloss {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

FASTLOSS_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A row-major matrix whose last stride is one; the row stride counts elements and may be anything (0: one shared row).
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  DType dtype = DType::kFloat32;

  FASTLOSS_HD char* row(int64_t i) const { return static_cast<char*>(data) + i * row_stride * size_of(dtype); }
};

// A vector of float32 (float64 when the logits are float64) that may be absent (nullptr) or shared (stride 0).
struct Vector {
  const void* data = nullptr;
  int64_t stride = 1;

  FASTLOSS_HD bool present() const { return data != nullptr; }
  template <class F>
  FASTLOSS_HD F at(int64_t i, F absent) const {
    return data ? static_cast<const F*>(data)[i * stride] : absent;
  }
};

}  // namespace fastloss
