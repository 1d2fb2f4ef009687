// Launching the kernels: how rows are cut into blocks, on which stream of the current device. Nothing here allocates or
// waits.
#pragma once

#include <string>

#include "rows.h"

namespace fastloss {

struct Stream {
  int device = 0;
  uintptr_t handle = 0;  // a cudaStream_t
};

// How a row is cut for the two-kernel path; any length.
Cut states_cut(const Rows& rows);
// How a row is cut so that it stays on chip between its state and its gradient; 0 slices: it does not fit.
Cut chip_cut(int device, const Rows& rows);

void launch_row_stats(const StatsArgs& args, void* states, int32_t* parts, Stream stream);
void launch_row_grad(GradArgs args, Stream stream);
void launch_row_loss_grad(LossGradArgs args, Stream stream);
void launch_denominator(const DenominatorArgs& args, Stream stream);
void launch_total(const TotalArgs& args, DType compute, Stream stream);
void launch_rescale(const RescaleArgs& args, Stream stream);

// Why the kernels cannot run on the current device, or nothing.
std::string cannot_run(int device);
// What the driver and the runtime say, for `doctor`.
std::string driver_report();

}  // namespace fastloss
