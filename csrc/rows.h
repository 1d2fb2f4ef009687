// What a call is about, the same for every processor: rows of logits, their targets, and what is said of each row.
#pragma once

#include "row_loss.h"

namespace fastloss {

// Rows of logits with their targets: class indices, or class probabilities when spec.soft. Vectors are in the compute
// type: float64 for float64 logits, float32 for all others.
struct Rows {
  Matrix input;
  Matrix probs;
  const int64_t* target = nullptr;
  int64_t ignore_index = -100;
  Vector weight;  // (V,) contiguous
  Spec spec;
  int threads = 1;  // of the CPU

  FASTLOSS_HD bool ignored(int64_t i) const { return !spec.soft && target[i] == ignore_index; }
};

// Statistics as five vectors of N in one array: centre, log_sum, log_prob, mass, entropy.
constexpr int kStats = 5;

// RowState as numbers: centre, sum, moment, plain, mass.
constexpr int kStates = 5;

}  // namespace fastloss
