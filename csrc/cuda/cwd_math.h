// Channel-wise distillation, element by element and row by row: what both layouts share.
#pragma once

#include "numbers.h"

namespace kdops::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// Sums of e_X = exp(k_X (x - max_X)) over a row, and of products with the distances from the maxima.
struct SoftmaxSums {
  float z_s = 0, z_t = 0, divergence = 0, s_under_s = 0, s_under_t = 0;
};
struct SoftmaxInputs {
  float k_s, k_t, max_s, max_t;
};

KDOPS_FN void add_softmax(SoftmaxSums& sums, const SoftmaxInputs& in, float s, float t) {
  const float ds = s - in.max_s, dt = t - in.max_t, ks = ds * in.k_s, kt = dt * in.k_t;
  const float es = device::exp2(ks * kLog2E), et = device::exp2(kt * kLog2E);
  sums.z_s += es;
  sums.z_t += et;
  sums.divergence += et * (kt - ks);
  sums.s_under_s += es * ds;
  sums.s_under_t += et * ds;
}

// E[s] under the student's softmax less E[s] under the teacher's, and the row's divergence.
KDOPS_FN float row_dot(const SoftmaxSums& sums) { return sums.s_under_s / sums.z_s - sums.s_under_t / sums.z_t; }
KDOPS_FN float row_divergence(const SoftmaxSums& sums) {
  return sums.divergence / sums.z_t + logf(sums.z_s / sums.z_t);
}

// dS = a e_S - b e_T - slope (s - mean)
struct GradientInputs {
  SoftmaxInputs in;
  float a, b, slope, mean;
};
KDOPS_FN float gradient_of(const GradientInputs& g, float s, float t) {
  const float es = device::exp2((s - g.in.max_s) * (g.in.k_s * kLog2E));
  const float et = device::exp2((t - g.in.max_t) * (g.in.k_t * kLog2E));
  return (g.a * es - g.b * et) - g.slope * (s - g.mean);
}

// The statistics of a row in device memory.
struct CwdStats {
  float* first;
  int64_t stride, row;
  KDOPS_FN CwdStats(const Problem& p, const Level& level, int n, int c)
      : first(p.stats), stride(p.rows), row(level.first_row + static_cast<int64_t>(n) * level.channels + c) {}
  KDOPS_FN float& operator()(int field) const { return first[field * stride + row]; }
};

KDOPS_FN SoftmaxInputs softmax_inputs(const Problem& p, const CwdStats& stats) {
  return {stats(kCwdRS) * p.inv_tau, stats(kCwdRT) * p.inv_tau, stats(kCwdMaxS), stats(kCwdMaxT)};
}

// grad_output times the factor of the row's gradient.
KDOPS_FN float row_grad(const Problem& p, const Level& level, int64_t row) {
  return p.grad_output == nullptr ? level.grad_scale : level.grad_scale * p.grad_output[row * p.grad_output_stride];
}

// `projection`: the sum of row_grad * dot over the images of the channel.
KDOPS_FN GradientInputs saved_gradient(const Problem& p, const Level& level, const CwdStats& stats, float projection) {
  const float r = stats(kCwdRS), outer = r * row_grad(p, level, stats.row);
  return {softmax_inputs(p, stats), outer / stats(kCwdZS), outer / stats(kCwdZT), r * r * stats(kCwdQS) * projection,
          stats(kCwdMeanS)};
}

}  // namespace kdops::cuda
