#include "cwd_channels.h"
#include "kernels.h"

namespace kdops::cuda {
namespace {

template <class T>
LossKernels cwd_kernels_of() {
  return {cwd_channels<T, true>, cwd_channels<T, false>, cwd_backward<T>, {kCwdImages, kCwdParts}, sizeof(T)};
}

}  // namespace

LossKernels cwd_kernels(Dtype dtype) {
  switch (dtype) {
    case kBFloat16: return cwd_kernels_of<BFloat16>();
    case kFloat16: return cwd_kernels_of<Float16>();
    default: return cwd_kernels_of<float>();
  }
}

}  // namespace kdops::cuda
