#include "cwd_lanes.h"
#include "kernels.h"

namespace kdops::cuda {
namespace {

template <class T>
LaneKernels cwd_lane_kernels_of() {
  return {cwd_lane_moments<T>, cwd_lane_merge, cwd_lane_sums<T>, cwd_lane_finish, cwd_lane_gradient<T>, kLaneMoments,
          kLaneMoments};
}

}  // namespace

LaneKernels cwd_lane_kernels(Dtype dtype) {
  switch (dtype) {
    case kBFloat16: return cwd_lane_kernels_of<BFloat16>();
    case kFloat16: return cwd_lane_kernels_of<Float16>();
    default: return cwd_lane_kernels_of<float>();
  }
}

}  // namespace kdops::cuda
