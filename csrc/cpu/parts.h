// Rows of which other processes have other classes, for class indices alone: what fastloss/parallel/merge.py has for
// every target and device, in one call where a small loss has no time for one per operation.
#pragma once

#include "rows.h"

namespace fastloss {

// What a part says of its rows: vectors (N,) of the compute type, one after another, as merge.py's fields.
enum PartColumn { kPartCentre, kPartLogSum, kPartMass, kPartLoss };

// Rows whose class indices count from the first class of all, of which the part begins at `start`. No class weights,
// smoothing, or z-loss.
struct Part {
  Rows rows;
  int64_t start = 0;
};

// Returns how many rows count.
int64_t part_loss(const Part& part, void* columns);

// From the columns of all parts, `stride` bytes apart: the statistics (kStats, N) of the whole; returns the summed
// loss.
double merge_parts(const char* columns, int64_t parts, int64_t stride, int64_t N, DType dtype, void* stats);

// The gradient of the part's logits, `upstream` times that of every row's loss.
void part_grad(const Part& part, const void* stats, double upstream, const Matrix& grad);

}  // namespace fastloss
