// Saved gradients times grad_output, multiplied in fp32 (fp64) and rounded once.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "problem.h"

namespace kdops {
namespace {

constexpr int64_t kGrain = 1 << 15;

template <class A>
void scale_into(const at::Tensor& in, const at::Tensor& out, Dtype dtype, double factor) {
  const auto from = static_cast<const char*>(in.data_ptr());
  const auto to = static_cast<char*>(out.data_ptr());
  const int64_t size = in.element_size();
  at::parallel_for(0, in.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernels<A>().scale[dtype](from + begin * size, to + begin * size, end - begin, static_cast<A>(factor));
  });
}

// Gradients are dense and never views: elements are processed in memory order.
void scale_one(const at::Tensor& in, const at::Tensor& out, double factor) {
  if (in.scalar_type() == at::kDouble)
    scale_into<double>(in, out, kFloat64, factor);
  else
    scale_into<float>(in, out, dtype_of(in), factor);
}

double factor_of(const at::Tensor& grad_output) {
  return grad_output.scalar_type() == at::kDouble ? *grad_output.data_ptr<double>() : *grad_output.data_ptr<float>();
}

std::vector<at::Tensor> scale_gradients(at::TensorList grads, const at::Tensor& grad_output) {
  std::vector<at::Tensor> out;
  for (const auto& grad : grads) {
    out.push_back(at::empty_like(grad));
    scale_one(grad, out.back(), factor_of(grad_output));
  }
  return out;
}

void scale_gradients_(at::TensorList grads, const at::Tensor& grad_output) {
  const double factor = factor_of(grad_output);
  if (factor == 1) return;
  for (const auto& grad : grads) scale_one(grad, grad, factor);
}

}  // namespace

TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("scale_gradients", scale_gradients);
  m.impl("scale_gradients_", scale_gradients_);
}

}  // namespace kdops
