// What crosses the language boundary: raw pointers with the shape, stride and dtype that make them safe to use.
// Plain data only, so that every translation unit, whatever its instruction set, agrees on it.
#pragma once

#include <cstdint>
#include <limits>

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

// Rows of one group: there are no others.
constexpr int64_t kOneGroup = std::numeric_limits<int64_t>::max();

// A row-major matrix whose last stride is one. Strides count elements and may be anything (0: one shared row). Rows lie
// at one stride, or at two: `group` rows at `row_stride`, and the groups at `group_stride`, as those of x[:, :-1] do.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  DType dtype = DType::kFloat32;
  int64_t group = kOneGroup;
  int64_t group_stride = 0;

  FASTLOSS_HD char* row(int64_t i) const { return static_cast<char*>(data) + offset(i) * size_of(dtype); }

 private:
  FASTLOSS_HD int64_t offset(int64_t i) const {
    if (i < group) return i * row_stride;  // no division where all rows are one group
#if defined(__CUDA_ARCH__)
    // Of 32 bits, as a grid's blocks are counted: a division of 64 is a call, around which registers are spilled.
    const uint32_t row = uint32_t(i), size = uint32_t(group), g = row / size;
    return int64_t(g) * group_stride + int64_t(row - g * size) * row_stride;
#else
    return i / group * group_stride + i % group * row_stride;
#endif
  }
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
