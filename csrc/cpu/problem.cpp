#include "problem.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

namespace kdops {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 15;

// The stride from one position to the next: within a line, or from line to line if a line has one position.
int64_t position_step(const at::Tensor& x) { return x.size(3) == 1 ? x.stride(2) : x.stride(3); }

bool positions_readable(const at::Tensor& x) { return x.size(2) * x.size(3) == 1 || position_step(x) == 1; }
bool channels_readable(const at::Tensor& x) { return x.size(1) == 1 || x.stride(1) == 1; }
bool readable(const at::Tensor& x, Lanes mode) {
  return mode == kPositionsInLanes ? positions_readable(x) : channels_readable(x);
}

bool collapsible(const at::Tensor& x) {
  return x.size(2) == 1 || x.size(3) == 1 || x.stride(2) == x.size(3) * x.stride(3);
}

at::MemoryFormat format_of(Lanes mode) {
  return mode == kPositionsInLanes ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

at::Tensor made_readable(const at::Tensor& x, Lanes mode) {
  return readable(x, mode) ? x : x.contiguous(format_of(mode));
}

// Chosen by the student's layout; a map that is readable both ways has one position or one channel.
Lanes mode_of(const at::Tensor& student, int lanes) {
  const bool by_channels = channels_readable(student), by_positions = positions_readable(student);
  if (by_channels && by_positions) {
    const int64_t positions = student.size(2) * student.size(3);
    return positions < lanes && student.size(1) > positions ? kChannelsInLanes : kPositionsInLanes;
  }
  return by_channels ? kChannelsInLanes : kPositionsInLanes;
}

}  // namespace

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return kFloat32;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default: return kFloat64;
  }
}

Dtype Level::student_dtype() const { return dtype_of(student); }
Dtype Level::teacher_dtype() const { return dtype_of(teacher); }

Strip Level::strip(const at::Tensor& x, int64_t n, int64_t block) const {
  const int64_t offset = n * x.stride(0) + block * block_rows * x.stride(1);
  char* data = static_cast<char*>(x.data_ptr()) + offset * x.element_size();
  if (collapsed) return {data, 1, 0, positions, position_step(x), 0};
  return {data, x.size(2), x.stride(2), x.size(3), x.stride(3), 0};
}

Strip Level::strip_fetching(const at::Tensor& x, int64_t n, int64_t block) const {
  Strip here = strip(x, n, block);
  if (block + 1 < blocks) here.next = block_rows * x.stride(1);
  return here;
}

Problem::Problem(at::TensorList student, at::TensorList teacher, int lanes, bool want_grads) {
  for (size_t i = 0; i < student.size(); ++i) {
    Level level;
    level.mode = mode_of(student[i], lanes);
    level.student = made_readable(student[i], level.mode);
    level.teacher = made_readable(teacher[i], level.mode);
    level.collapsed = collapsible(level.student) && collapsible(level.teacher);
    if (want_grads) {
      level.grad = at::empty_like(student[i]);
      level.grad_in_place = readable(level.grad, level.mode)
                                ? level.grad
                                : at::empty_like(level.grad, level.grad.options(), format_of(level.mode));
      level.collapsed = level.collapsed && collapsible(level.grad_in_place);
    }
    level.batch = student[i].size(0), level.channels = student[i].size(1);
    level.positions = student[i].size(2) * student[i].size(3);
    level.first_row = rows, level.first_channel = channels;
    level.block_rows = level.mode == kChannelsInLanes ? lanes : 1;
    level.blocks = (level.channels + level.block_rows - 1) / level.block_rows;
    rows += level.batch * level.channels, channels += level.channels;
    levels.push_back(std::move(level));
  }
}

void Problem::run(const std::vector<Pass>& passes) const {
  int64_t elements = 0, fewest_groups = levels[0].blocks;
  for (const auto& level : levels) {
    elements += level.student.numel();
    // The largest level decides; it is the first of every pyramid.
    if (level.student.numel() > elements / 2) fewest_groups = level.blocks;
  }
  const int64_t threads =
      at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), 1 + elements / kElementsPerThread);

  // Every thread gets a share of every level, so that no thread has a large level to itself.
  const auto in_parallel = [&](auto count, auto&& work) {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (const auto& level : levels) {
        const int64_t all = count(level);
        for (int64_t i = all * begin / threads; i < all * end / threads; ++i) work(level, i);
      }
    });
  };
  const auto groups = [](const Level& level) { return level.blocks; };
  const auto units = [](const Level& level) { return level.blocks * level.batch; };

  if (fewest_groups >= 2 * threads) {
    in_parallel(groups, [&](const Level& level, int64_t block) {
      for (const auto& pass : passes) {
        if (pass.group) pass.group(level, block);
        if (pass.unit)
          for (int64_t n = 0; n < level.batch; ++n) pass.unit(level, n, block);
      }
    });
    return;
  }
  for (const auto& pass : passes) {
    if (pass.group) in_parallel(groups, pass.group);
    if (pass.unit)
      in_parallel(units, [&](const Level& level, int64_t i) { pass.unit(level, i / level.blocks, i % level.blocks); });
  }
}

std::vector<at::Tensor> Problem::finished_grads() const {
  std::vector<at::Tensor> grads;
  for (const auto& level : levels) {
    if (!level.grad.is_same(level.grad_in_place)) level.grad.copy_(level.grad_in_place);
    grads.push_back(level.grad);
  }
  return grads;
}

bool is_double(at::TensorList student, at::TensorList teacher) {
  const auto wide = [](const at::Tensor& x) { return x.scalar_type() == at::kDouble; };
  return std::any_of(student.begin(), student.end(), wide) || std::any_of(teacher.begin(), teacher.end(), wide);
}

std::vector<at::Tensor> as_double(at::TensorList maps) {
  std::vector<at::Tensor> out;
  for (const auto& x : maps) out.push_back(x.to(at::kDouble));
  return out;
}

void cast_like(std::vector<at::Tensor>& grads, at::TensorList student) {
  for (size_t i = 0; i < grads.size(); ++i) grads[i] = grads[i].to(student[i].scalar_type());
}

Scale channel_scale(int64_t norm, double eps, double m2, double count) {
  if (norm == kNoNorm) return {1.0, 0.0};
  m2 = m2 < 0 ? 0 : m2;  // NaN stays
  if (norm == kBatchNorm) {
    const double r = 1 / std::sqrt(m2 / count + eps);
    return {r, r / count};
  }
  const double deviation = std::sqrt(m2 / (count - 1));
  // Where the deviation is 0, its gradient is defined as 0, as in torch.std.
  return {1 / (deviation + eps), deviation == 0 ? 0.0 : 1 / ((count - 1) * deviation)};
}

}  // namespace kdops
