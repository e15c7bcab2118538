#include "kernels.h"
#include "pkd_channels.h"

namespace kdops::cuda {
namespace {

template <class T>
LossKernels pkd_kernels_of() {
  return {pkd_channels<T, true>, pkd_channels<T, false>, pkd_backward<T>, {kPkdImages, kCoMoments}, sizeof(T)};
}

}  // namespace

LossKernels pkd_kernels(Dtype dtype) {
  switch (dtype) {
    case kBFloat16: return pkd_kernels_of<BFloat16>();
    case kFloat16: return pkd_kernels_of<Float16>();
    default: return pkd_kernels_of<float>();
  }
}

}  // namespace kdops::cuda
