// Converts the tensors of an operator call to the kernels' Problem.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "plan.h"

namespace kdops::cuda {

enum Reduction : int64_t { kMean = 0, kSum = 1, kNone = 2 };
enum Save : int64_t { kSaveNothing = 0, kSaveStats = 1, kSaveGrads = 2 };

struct Options {
  double tau;
  int64_t norm;
  double eps, loss_weight;
  int64_t reduction;
};

// The maps of a call as `path` reads them, with gradients allocated if wanted. Throws std::invalid_argument if the path
// does not support them.
class Call {
 public:
  Call(at::TensorList student, at::TensorList teacher, const Options& options, Path path, bool want_grads);

  Problem problem{};
  Dtype dtype;
  std::vector<at::Tensor> grads;
  int64_t rows = 0, channels = 0;

  at::Tensor empty(at::IntArrayRef sizes) const;
  at::Tensor zero_counters(int64_t count) const;
  // Throws if the path does not support the maps.
  Level level_of(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor* grad, Path path) const;

 private:
  at::TensorOptions options_;
};

}  // namespace kdops::cuda
