// How a call is cut into blocks, clusters and waves: from shapes, element size and device limits alone. The constants
// are derived, not measured: none of this has run on a GPU yet.
#pragma once

#include "kernels.h"

namespace kdops::cuda {

// Each fills in the levels' splits, chunks and first units, and the problem's units, group and part_count. Throws
// std::invalid_argument with the reason where a path cannot take the call.
Launch plan_channels(Problem& problem, Path path, const LossKernels& kernels);
Launch plan_backward(Problem& problem, const LossKernels& kernels);
// channels_last: a block for each piece of 64 channels; and a launch with `group` blocks for each level.
Launch plan_lanes(Problem& problem, const LaneKernels& kernels);
Launch per_level(Problem& problem, int blocks, const LaneKernels& kernels);

}  // namespace kdops::cuda
