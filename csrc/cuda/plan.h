// How a call is divided into blocks, clusters and waves: from shapes, element size and device limits only. The
// constants are derived, not measured.
#pragma once

#include "kernels.h"

namespace kdops::cuda {

// Each fills in the levels' splits, chunks and first units, and the problem's units, group and part_count. Throws
// std::invalid_argument with the reason if a path does not support the call.
Launch plan_channels(Problem& problem, Path path, const LossKernels& kernels);
Launch plan_backward(Problem& problem, const LossKernels& kernels);
// channels_last: one block per piece of 64 channels; and a launch with `group` blocks per level.
Launch plan_lanes(Problem& problem, const LaneKernels& kernels);
Launch per_level(Problem& problem, int blocks, const LaneKernels& kernels);

}  // namespace kdops::cuda
