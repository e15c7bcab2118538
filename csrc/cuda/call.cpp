#include "call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <stdexcept>
#include <string>

namespace kdops::cuda {
namespace {

[[noreturn]] void refuse(const std::string& reason) { throw std::invalid_argument(reason); }

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return kFloat32;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default: refuse("the CUDA C++ kernels take float32, bfloat16 and float16 maps");
  }
}

// Unused strides are 0.
int64_t stride_of(const at::Tensor& x, int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

// The stride of height and width as one dimension, or -1 if they do not collapse.
int64_t position_stride(const at::Tensor& x) {
  if (x.size(2) == 1 && x.size(3) == 1) return 1;
  if (x.size(3) == 1) return x.stride(2);
  if (x.size(2) == 1 || x.stride(2) == x.size(3) * x.stride(3)) return x.stride(3);
  return -1;
}

Map map_of(const at::Tensor& x, Path path) {
  const Map map = {x.data_ptr(), stride_of(x, 0), stride_of(x, 1), position_stride(x)};
  if (map.stride_p < 0) refuse("height and width are not one dimension in memory");
  if (path == kChannelsLast ? x.size(1) > 1 && map.stride_c != 1 : map.stride_p != 1)
    refuse(path == kChannelsLast ? "the maps are not channels_last" : "the positions of a row are not contiguous");
  return map;
}

bool alike(const Map& a, const Map& b, int64_t element_bytes, int64_t pack) {
  const auto phase = [&](const Map& m) { return reinterpret_cast<uintptr_t>(m.data) / element_bytes % pack; };
  return phase(a) == phase(b) && (a.stride_n - b.stride_n) % pack == 0 && (a.stride_c - b.stride_c) % pack == 0;
}

// Whether two neighbouring channels can be read at once.
bool in_pairs(const Map& m, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(m.data) % (2 * element_bytes) == 0 && m.stride_n % 2 == 0 && m.stride_p % 2 == 0;
}

}  // namespace

Level Call::level_of(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor* grad, Path path) const {
  Level level{};
  level.student = map_of(student, path), level.teacher = map_of(teacher, path);
  level.grad = grad ? map_of(*grad, path) : level.student;
  if (student.size(2) * student.size(3) > INT32_MAX / 2) refuse("a row has more than 2^30 positions");
  level.batch = static_cast<int>(student.size(0)), level.channels = static_cast<int>(student.size(1));
  level.positions = static_cast<int>(student.size(2) * student.size(3));
  level.first_row = rows, level.first_channel = channels;
  const int64_t bytes = student.element_size();
  if (path == kChannelsLast) {
    level.aligned = in_pairs(level.student, bytes) && in_pairs(level.teacher, bytes) && in_pairs(level.grad, bytes);
    return level;
  }
  const int64_t pack = 16 / bytes;
  level.aligned = alike(level.student, level.teacher, bytes, pack) && alike(level.student, level.grad, bytes, pack);
  return level;
}

Call::Call(at::TensorList student, at::TensorList teacher, const Options& options, Path path, bool want_grads)
    : dtype(dtype_of(student[0])), options_(student[0].options().dtype(at::kFloat)) {
  if (student.size() > kMaxLevels) refuse("a launch has room for " + std::to_string(kMaxLevels) + " levels");
  for (size_t i = 0; i < student.size(); ++i) {
    if (student[i].scalar_type() != student[0].scalar_type() || teacher[i].scalar_type() != student[0].scalar_type())
      refuse("the maps differ in dtype");
    if (want_grads) grads.push_back(at::empty_like(student[i]));
    const Level level = level_of(student[i], teacher[i], want_grads ? &grads.back() : nullptr, path);
    problem.level[problem.levels++] = level;
    rows += static_cast<int64_t>(level.batch) * level.channels, channels += level.channels;
  }
  problem.norm = static_cast<int>(options.norm), problem.eps = static_cast<float>(options.eps);
  problem.inv_tau = static_cast<float>(1 / options.tau), problem.want_grads = want_grads;
}

at::Tensor Call::empty(at::IntArrayRef sizes) const { return at::empty(sizes, options_); }
at::Tensor Call::zero_counters(int64_t count) const { return at::zeros({count}, options_.dtype(at::kInt)); }

}  // namespace kdops::cuda
