// The work of a call: levels divided into strips, and parallel passes over them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

#include "strip.h"

namespace kdops {

enum Reduction : int64_t { kMean = 0, kSum = 1, kNone = 2 };
enum Norm : int64_t { kNoNorm = 0, kBatchNorm = 1, kPkdNorm = 2 };
enum Save : int64_t { kSaveNothing = 0, kSaveStats = 1, kSaveGrads = 2 };  // bits: both may be set

// One pyramid level. A unit (n, block) is the work of one kernel call: a row, or as many neighbouring channels as a
// register has lanes. A group is the units of all n: the channels that share statistics.
struct Level {
  at::Tensor student, teacher;     // readable in `mode`
  at::Tensor grad, grad_in_place;  // what is returned, and what the kernels write (another tensor only for odd strides)
  int64_t batch, channels, positions;
  int64_t first_row, first_channel;  // in arrays over all levels
  int64_t blocks;                    // groups
  int64_t block_rows;                // rows of a unit; the last block may have fewer
  Lanes mode;
  bool collapsed;  // height and width are one dimension in all of its maps

  Dtype student_dtype() const;
  Dtype teacher_dtype() const;
  int rows(int64_t block) const { return static_cast<int>(std::min(block_rows, channels - block * block_rows)); }
  int64_t row(int64_t n, int64_t block) const { return first_row + n * channels + block * block_rows; }
  int64_t channel(int64_t block) const { return first_channel + block * block_rows; }
  Strip strip(const at::Tensor& x, int64_t n, int64_t block) const;
  // The same, and prefetch the next group's strip.
  Strip strip_fetching(const at::Tensor& x, int64_t n, int64_t block) const;
};

// A pass calls `unit` for every (n, block), or `group` for every block.
struct Pass {
  std::function<void(const Level&, int64_t n, int64_t block)> unit;
  std::function<void(const Level&, int64_t block)> group;
};

struct Problem {
  std::vector<Level> levels;
  int64_t rows = 0, channels = 0;

  // `lanes`: of the kernels' registers. With `want_grads`, gradients are allocated.
  Problem(at::TensorList student, at::TensorList teacher, int lanes, bool want_grads);

  // Runs the passes in order: all passes of a group, then the next group, so that its maps stay in the cache. With too
  // few groups for the threads, pass by pass over all units.
  void run(const std::vector<Pass>& passes) const;

  // The gradients to return.
  std::vector<at::Tensor> finished_grads() const;
};

// grad_output of each unit for reduction "none"; a scalar, or none at all (1), applies to every unit.
template <class A>
struct GradOutput {
  const A* data = nullptr;
  int64_t stride = 0;
  GradOutput() = default;
  explicit GradOutput(const at::Tensor& x) : data(x.data_ptr<A>()), stride(x.dim() ? x.stride(0) : 0) {}
  double operator()(int64_t unit) const { return data ? static_cast<double>(data[unit * stride]) : 1.0; }
};

using Outputs = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;  // loss, stats, grads

// Calls run(A{}, student, teacher) with A = float, or with A = double and all maps in fp64 if one of them is. fp64 is
// for checking gradients, so the copies do not matter.
Dtype dtype_of(const at::Tensor& x);
bool is_double(at::TensorList student, at::TensorList teacher);
std::vector<at::Tensor> as_double(at::TensorList maps);
void cast_like(std::vector<at::Tensor>& grads, at::TensorList student);
inline std::vector<at::Tensor>& grads_of(std::vector<at::Tensor>& grads) { return grads; }
inline std::vector<at::Tensor>& grads_of(Outputs& outputs) { return std::get<2>(outputs); }

template <class Run>
auto in_accumulation_dtype(at::TensorList student, at::TensorList teacher, Run&& run) {
  if (!is_double(student, teacher)) return run(float{}, student, teacher);
  const auto wide_student = as_double(student), wide_teacher = as_double(teacher);
  auto result = run(double{}, at::TensorList(wide_student), at::TensorList(wide_teacher));
  cast_like(grads_of(result), student);
  return result;
}

// 1/sqrt(var+eps) or 1/(std+eps) of a channel, and the factor of the projection in its backward.
struct Scale {
  double r, q;
};
Scale channel_scale(int64_t norm, double eps, double m2, double count);

}  // namespace kdops
