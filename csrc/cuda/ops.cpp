// Operators of the CUDA C++ kernels. They are internal: Triton implements kdops::cwd_loss and kdops::pkd_loss, and
// these are called where kdops/_cuda.py selects a path by its number. Same statistics, same results.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#ifndef KDOPS_HOST_SHIM
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "call.h"

namespace kdops::cuda {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;  // loss, stats, grads

// Makes a tensor's device current, and gives its stream.
#ifdef KDOPS_HOST_SHIM
struct OnDevice {
  explicit OnDevice(const at::Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
struct OnDevice {
  explicit OnDevice(const at::Tensor& x) : guard(x.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  c10::cuda::CUDAGuard guard;
};
#endif

// The differences between the losses on the host side.
struct Cwd {
  static constexpr const char* kName = "cwd_loss";
  static constexpr int64_t kStats = kCwdStats;
  static LossKernels kernels(Dtype dtype) { return cwd_kernels(dtype); }
  static LaneKernels lane_kernels(Dtype dtype) { return cwd_lane_kernels(dtype); }
  static int64_t units(const Call& call) { return call.rows; }
  static void scale(Level& level, const Options& o) {
    const double rows = o.reduction == kMean ? double(level.batch) * level.channels : 1.0;
    level.loss_scale = static_cast<float>(o.loss_weight * o.tau * o.tau / rows);
    level.grad_scale = static_cast<float>(o.loss_weight * o.tau / rows);
  }
};

struct Pkd {
  static constexpr const char* kName = "pkd_loss";
  static constexpr int64_t kStats = kPkdStats;
  static LossKernels kernels(Dtype dtype) { return pkd_kernels(dtype); }
  static LaneKernels lane_kernels(Dtype dtype) { return pkd_lane_kernels(dtype); }
  static int64_t units(const Call& call) { return call.channels; }
  static void scale(Level& level, const Options& o) {
    const double scale = o.loss_weight / (double(level.batch) * level.positions) /
                         (o.reduction == kMean ? double(level.channels) : 1.0);
    level.loss_scale = static_cast<float>(scale / 2), level.grad_scale = static_cast<float>(scale);
  }
};

template <class Loss>
void prepare(Call& call, const Options& options) {
  for (int i = 0; i < call.problem.levels; ++i) Loss::scale(call.problem.level[i], options);
  call.problem.rows = Loss::units(call);
}

void forward_channels(Call& call, const LossKernels& kernels, Path path, void* stream) {
  Problem& p = call.problem;
  const Launch launch = plan_channels(p, path, kernels);
  at::Tensor parts, arrivals;
  if (path == kWaves) {
    const int64_t groups = launch.blocks / p.group;
    parts = call.empty({groups * 2 * kernels.fields.parts * p.part_count});
    arrivals = call.zero_counters(groups);
    p.parts = parts.data_ptr<float>();
    p.arrivals = reinterpret_cast<unsigned*>(arrivals.data_ptr<int>());
  }
  run(path == kWaves ? kernels.in_waves : kernels.on_chip, launch, p, stream);
}

void forward_lanes(Call& call, const LaneKernels& kernels, void* stream) {
  Problem& p = call.problem;
  const Launch over_pieces = plan_lanes(p, kernels);
  const at::Tensor parts = call.empty({kernels.parts * p.part_count});
  p.parts = parts.data_ptr<float>();
  int64_t most_channels = 0, most_rows = 0;
  for (int i = 0; i < p.levels; ++i) {
    most_channels = std::max<int64_t>(most_channels, p.level[i].channels);
    most_rows = std::max(most_rows, int64_t(p.level[i].batch) * p.level[i].channels);
  }
  run(kernels.moments, over_pieces, p, stream);
  run(kernels.merge, per_level(p, static_cast<int>((most_channels + kLanes - 1) / kLanes), kernels), p, stream);
  if (kernels.sums) {
    run(kernels.sums, over_pieces, p, stream);
    run(kernels.finish, per_level(p, static_cast<int>((most_rows + kThreads - 1) / kThreads), kernels), p, stream);
  }
  if (p.want_grads) run(kernels.gradient, over_pieces, p, stream);
}

template <class Loss>
Outputs forward(at::TensorList student, at::TensorList teacher, const Options& options, int64_t save, Path path) {
  const OnDevice device(student[0]);
  const bool want_grads = save == kSaveGrads;
  Call call(student, teacher, options, path, want_grads);
  if (want_grads && options.reduction == kNone) throw std::invalid_argument("reduction none recomputes gradients");
  // Entries are about tau / (N C H W) and underflow in fp16 before a GradScaler's factor reaches them.
  if (want_grads && call.dtype == kFloat16) throw std::invalid_argument("fp16 gradients made in the forward underflow");
  prepare<Loss>(call, options);
  // channels_last passes exchange their statistics through memory.
  const bool keep_stats = save == kSaveStats || path == kChannelsLast;
  const at::Tensor losses = call.empty({call.problem.rows});
  const at::Tensor stats = keep_stats ? call.empty({Loss::kStats, call.problem.rows}) : call.empty({0});
  call.problem.losses = losses.data_ptr<float>();
  if (keep_stats) call.problem.stats = stats.data_ptr<float>();
  if (path == kChannelsLast) {
    forward_lanes(call, Loss::lane_kernels(call.dtype), device.stream());
  } else {
    forward_channels(call, Loss::kernels(call.dtype), path, device.stream());
  }
  return {options.reduction == kNone ? losses : at::sum(losses), save == kSaveStats ? stats : call.empty({0}),
          std::move(call.grads)};
}

template <class Loss>
std::vector<at::Tensor> backward(const at::Tensor& grad_output, at::TensorList student, at::TensorList teacher,
                                 const at::Tensor& stats, const Options& options, Path path) {
  const OnDevice device(student[0]);
  Call call(student, teacher, options, path, true);
  prepare<Loss>(call, options);
  Problem& p = call.problem;
  TORCH_CHECK(stats.dim() == 2 && stats.size(0) == Loss::kStats && stats.size(1) == p.rows && stats.is_contiguous(),
              Loss::kName, ": stats must be contiguous and of shape (", Loss::kStats, ", ", p.rows, "), got ",
              stats.sizes());
  p.stats = stats.data_ptr<float>();
  p.grad_output = grad_output.data_ptr<float>();
  p.grad_output_stride = grad_output.dim() ? grad_output.stride(0) : 0;
  if (path == kChannelsLast) {
    const LaneKernels kernels = Loss::lane_kernels(call.dtype);
    run(kernels.gradient, plan_lanes(p, kernels), p, device.stream());
  } else {
    const LossKernels kernels = Loss::kernels(call.dtype);
    run(kernels.backward, plan_backward(p, kernels), p, device.stream());
  }
  return std::move(call.grads);
}

// An unsupported call raises NotImplementedError in Python, with the operator, the path and the reason, so that the
// caller can try another path.
template <class Loss, class Work>
auto named(int64_t path, Work&& work) {
  try {
    return work(static_cast<Path>(path));
  } catch (const std::invalid_argument& refused) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, Loss::kName, ": path ", path, " cannot take this call: ", refused.what());
  }
}

Outputs cwd_forward(at::TensorList student, at::TensorList teacher, double tau, int64_t norm, double eps,
                    double loss_weight, int64_t reduction, int64_t save, int64_t path) {
  return named<Cwd>(path, [&](Path taken) {
    return forward<Cwd>(student, teacher, {tau, norm, eps, loss_weight, reduction}, save, taken);
  });
}

std::vector<at::Tensor> cwd_backward(const at::Tensor& grad_output, at::TensorList student, at::TensorList teacher,
                                     const at::Tensor& stats, double tau, int64_t norm, double eps, double loss_weight,
                                     int64_t reduction, int64_t path) {
  return named<Cwd>(path, [&](Path taken) {
    return backward<Cwd>(grad_output, student, teacher, stats, {tau, norm, eps, loss_weight, reduction}, taken);
  });
}

Outputs pkd_forward(at::TensorList student, at::TensorList teacher, int64_t norm, double eps, double loss_weight,
                    int64_t reduction, int64_t save, int64_t path) {
  return named<Pkd>(path, [&](Path taken) {
    return forward<Pkd>(student, teacher, {1.0, norm, eps, loss_weight, reduction}, save, taken);
  });
}

std::vector<at::Tensor> pkd_backward(const at::Tensor& grad_output, at::TensorList student, at::TensorList teacher,
                                     const at::Tensor& stats, int64_t norm, double eps, double loss_weight,
                                     int64_t reduction, int64_t path) {
  return named<Pkd>(path, [&](Path taken) {
    return backward<Pkd>(grad_output, student, teacher, stats, {1.0, norm, eps, loss_weight, reduction}, taken);
  });
}

// Why a path does not support these maps, or an empty string: plans the forward without launching it, and checks the
// backward's maps, as the gradient of a map with overlapping memory has other strides than the map.
template <class Loss>
std::string refusal(at::TensorList student, at::TensorList teacher, Path path) {
  const OnDevice device(student[0]);
  try {
    Call call(student, teacher, {1.0, kBatchNorm, 0.0, 1.0, kMean}, path, false);
    for (size_t i = 0; i < student.size(); ++i) {
      const at::Tensor grad = at::empty_like(student[i], student[i].options().device(at::kMeta));
      call.level_of(student[i], teacher[i], &grad, path);
    }
    if (path != kChannelsLast) plan_channels(call.problem, path, Loss::kernels(call.dtype));
    return "";
  } catch (const std::invalid_argument& refused) {
    return refused.what();
  }
}

std::string any_refusal(const std::string& loss, int64_t path, at::TensorList student, at::TensorList teacher) {
  const bool cwd = loss == Cwd::kName;
  TORCH_CHECK(cwd || loss == Pkd::kName, "cuda_refusal: loss must be cwd_loss or pkd_loss, got ", loss);
  return (cwd ? refusal<Cwd> : refusal<Pkd>)(student, teacher, static_cast<Path>(path));
}

#define KDOPS_MAPS "Tensor[] student, Tensor[] teacher, "
#define KDOPS_CWD "float tau, int norm, float eps, float loss_weight, int reduction, "
#define KDOPS_PKD "int norm, float eps, float loss_weight, int reduction, "
#define KDOPS_OUTPUTS " -> (Tensor loss, Tensor stats, Tensor[] grads)"

void define(torch::Library& m) {
  m.def("cuda_refusal(str loss, int path, Tensor[] student, Tensor[] teacher) -> str");
  m.def("cwd_loss_cuda(" KDOPS_MAPS KDOPS_CWD "int save, int path)" KDOPS_OUTPUTS);
  m.def("cwd_loss_backward_cuda(Tensor grad_output, " KDOPS_MAPS "Tensor stats, " KDOPS_CWD "int path) -> Tensor[]");
  m.def("pkd_loss_cuda(" KDOPS_MAPS KDOPS_PKD "int save, int path)" KDOPS_OUTPUTS);
  m.def("pkd_loss_backward_cuda(Tensor grad_output, " KDOPS_MAPS "Tensor stats, " KDOPS_PKD "int path) -> Tensor[]");
}

void implement(torch::Library& m) {
  m.impl("cuda_refusal", any_refusal);
  m.impl("cwd_loss_cuda", cwd_forward);
  m.impl("cwd_loss_backward_cuda", cwd_backward);
  m.impl("pkd_loss_cuda", pkd_forward);
  m.impl("pkd_loss_backward_cuda", pkd_backward);
}

}  // namespace

#ifdef KDOPS_HOST_SHIM
TORCH_LIBRARY(kdops_shim, m) { define(m); }
TORCH_LIBRARY_IMPL(kdops_shim, CPU, m) { implement(m); }
#else
TORCH_LIBRARY_FRAGMENT(kdops, m) { define(m); }
TORCH_LIBRARY_IMPL(kdops, CUDA, m) { implement(m); }
#endif

}  // namespace kdops::cuda
