#include "pkd_lanes.h"
#include "kernels.h"

namespace kdops::cuda {
namespace {

template <class T>
LaneKernels pkd_lane_kernels_of() {
  return {pkd_lane_moments<T>, pkd_lane_merge, nullptr, nullptr, pkd_lane_gradient<T>, kCoMoments, kCoMoments + 1};
}

}  // namespace

LaneKernels pkd_lane_kernels(Dtype dtype) {
  switch (dtype) {
    case kBFloat16: return pkd_lane_kernels_of<BFloat16>();
    case kFloat16: return pkd_lane_kernels_of<Float16>();
    default: return pkd_lane_kernels_of<float>();
  }
}

}  // namespace kdops::cuda
