// The CPU kernels, compiled once per instruction set (rows.cpp) and chosen at run time (dispatch.cpp).
#pragma once

#include "../rows.h"

namespace fastloss {

enum class Reduction : int { kNone, kMean, kSum };

struct RowOutputs {
  void* loss = nullptr;       // (N,)
  void* stats = nullptr;      // (kStats, N)
  int64_t* argmax = nullptr;  // (N,), or null
  int64_t* rank = nullptr;    // (N,) of class indices, or null
  bool extras = false;        // entropy too
  bool whole = false;         // stats hold those of whole rows, of which these are a part (kJS)
  void* listed = nullptr;     // (N, picks): of head_loss, the logits of what targets list
};

struct Reduced {
  Reduction reduction = Reduction::kMean;
  Vector token_weight;
  bool has_normalizer = false;  // the caller's denominator, in place of the mean's own
  double normalizer = 0;
  double upstream = 1;
  Matrix grad;             // data == nullptr: the loss alone
  bool streaming = false;  // write the gradient past the caches
};

// Operands of a product: strides in elements, any, also negative or zero.
struct Strided {
  void* data = nullptr;
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
  DType dtype = DType::kFloat32;

  const char* at(int64_t i, int64_t j) const {
    return static_cast<const char*>(data) + (i * row_stride + j * col_stride) * size_of(dtype);
  }
};

// C (M, N), of the compute type, its rows contiguous: a b, or C + a b with `add`; or with `start` (N,), of the compute
// type too, start + a b.
struct Product {
  Strided a, b;
  void* out = nullptr;
  int64_t stride = 0;
  const void* start = nullptr;
  bool add = false;
  int threads = 1;
};

// Where logits come from that are not kept: hidden (N, H) times weight (H, V), plus bias (V,) of the compute type, or
// null.
struct Head {
  Strided hidden, weight;
  const void* bias = nullptr;
};

// A kernel table: `..._states` what each row's part of the vocabulary contributes, for `merge_states`; `..._loss`
// statistics and losses; `..._grad` the gradient from them; `..._loss_grad` both at once, each row's gradient while the
// row is in cache, which returns the reduced loss.
struct Kernels {
  const char* isa;
  void (*row_states)(const Rows&, double* states);  // (N, kStates)
  void (*merge_states)(const double* a, const double* b, double* out, int64_t N);
  void (*row_loss)(const Rows&, const RowOutputs&);
  void (*row_grad)(const Rows&, const void* stats, const Vector upstream[4], const Matrix& grad);
  double (*row_loss_grad)(const Rows&, const Reduced&);
  void (*matmul)(const Product&);
  void (*head_loss)(const Rows&, const Head&, const RowOutputs&);  // row_loss of rows whose input has no address
};

}  // namespace fastloss
