// What a call is about, the same for every processor: rows of logits, their targets, and what is said of each row.
#pragma once

#include "row_loss.h"

namespace fastloss {

// Rows of logits with their targets. Vectors, and the probabilities of listed classes, are in the compute type: float64
// for float64 logits, float32 for all others.
struct Rows {
  Matrix input;
  const int64_t* target = nullptr;  // class indices (N, picks)
  int64_t picks = 1;
  Matrix probs;    // of all classes (N, V), or of the listed ones (N, picks)
  Matrix teacher;  // target logits (N, V)
  int64_t ignore_index = -100;
  Vector weight;  // (V,) contiguous
  Spec spec;
  int threads = 1;  // of the CPU

  FASTLOSS_HD bool ignored(int64_t i) const {
    if (!spec.indexed()) return false;
    for (int64_t k = i * picks; k < (i + 1) * picks; ++k)
      if (target[k] != ignore_index) return false;
    return true;
  }
};

// Statistics as five vectors of N in one array: RowStats or, of divergences, PairStats.
constexpr int kStats = 5;

// RowState as numbers: centre, sum, moment, plain, mass.
constexpr int kStates = 5;

}  // namespace fastloss
