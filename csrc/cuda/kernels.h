// The kernels of each loss by element type, for the host side.
#pragma once

#include "launch.h"

namespace kdops::cuda {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The number of values per image and per piece that a block of paths 1 to 3 keeps in shared memory.
struct Fields {
  int images, parts;
};

struct LossKernels {
  Kernel on_chip, in_waves;  // a channel: paths 1 and 2, path 3
  Kernel backward;           // the gradient from statistics, NCHW
  Fields fields;
  int element_bytes;
};

// channels_last, in launch order; a loss without softmax sums has neither `sums` nor `finish`.
struct LaneKernels {
  Kernel moments, merge, sums, finish;
  Kernel gradient;
  int parts;         // maximum number of partial results of a piece
  int warp_results;  // maximum number of values of a warp and channel in shared memory
};

LossKernels cwd_kernels(Dtype dtype);
LossKernels pkd_kernels(Dtype dtype);
LaneKernels cwd_lane_kernels(Dtype dtype);
LaneKernels pkd_lane_kernels(Dtype dtype);

}  // namespace kdops::cuda
