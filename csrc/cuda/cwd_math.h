// Channel-wise distillation, the arithmetic of elements and rows that both layouts share.
//
// A row's divergence is E_T[d] + ln(Z_S / Z_T) + offset, with d = ln e_T - ln e_S - offset for any offset. The two
// terms nearly cancel where the student is close to the teacher. With w = E_T[exp(-d) - 1] it is also
//
//     E_T[d + exp(-d) - 1] + (ln(1 + w) - w)
//
// The first term is a sum of non-negative numbers, the second is of second order in w, which an offset near the mean of
// d keeps small. Both come from one pass over the row, so no path reads more for them. The remaining error is that of
// each d, from the rounding of fp32 products, some 1e-7 of the logits' range. Relative errors of the value with a
// student whose elements differ by e of themselves from the teacher's, tau 4, on every path: 2e-7 down to e = 1e-2
// (loss 5e-5), 2e-6 at 1e-3, 1e-5 at 1e-4 and 3e-4 at 1e-5 (loss 5e-11).
#pragma once

#include "numbers.h"

namespace kdops::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMostOffset = 24.0f;  // 2^24 is far from overflow

// e_X = 2^(k_X (x - max_X)) of a row: exponents, d and offsets are in units of ln 2.
struct SoftmaxInputs {
  float k_s, k_t, max_s, max_t;
};
KDOPS_FN SoftmaxInputs softmax_inputs(const Problem& p, float r_s, float r_t, float max_s, float max_t) {
  const float unit = p.inv_tau * kLog2E;
  return {r_s * unit, r_t * unit, max_s, max_t};
}
struct SumInputs {
  SoftmaxInputs in;
  float offset, factor;  // of d, and its exponential
};
KDOPS_FN SumInputs sum_inputs(const SoftmaxInputs& in, float offset) {
  return {in, offset, device::exp2(offset)};
}
// d at the centres of both maps, without an offset. NaN and large values are clamped: the result holds for any offset.
KDOPS_FN float row_offset(const SoftmaxInputs& in, float centre_s, float centre_t) {
  const float wanted = in.k_t * (centre_t - in.max_t) - in.k_s * (centre_s - in.max_s);
  return wanted > -kMostOffset ? (wanted < kMostOffset ? wanted : kMostOffset) : -kMostOffset;
}

// Sums of e_X over a row, of e_T d, of e_T (d + exp(-d) - 1), and of products with the student's distance from its
// maximum.
struct SoftmaxSums {
  float z_s = 0, z_t = 0, difference = 0, excess = 0, s_under_s = 0, s_under_t = 0;
};

KDOPS_FN void add_softmax(SoftmaxSums& sums, const SumInputs& x, float s, float t) {
  const float ds = s - x.in.max_s, dt = t - x.in.max_t, d = (dt * x.in.k_t - x.offset) - ds * x.in.k_s;
  const float es = device::exp2(ds * x.in.k_s), et = device::exp2(dt * x.in.k_t), weighted = et * d;
  constexpr float a = kLn2 * kLn2 / 2, b = -a * kLn2 / 3, c = -b * kLn2 / 4, e = -c * kLn2 / 5, f = -e * kLn2 / 6;
  const float series = d * (a + d * (b + d * (c + d * (e + d * f))));
  const bool small = fabsf(d) < 0.36f;  // where the series is accurate to 4e-7, and the other form would cancel
  sums.z_s += es;
  sums.z_t += et;
  sums.difference += weighted;
  sums.excess += small ? weighted * series : weighted * kLn2 + (es * x.factor - et);
  sums.s_under_s += es * ds;
  sums.s_under_t += et * ds;
}

enum SoftmaxSum { kZS, kZT, kDifference, kExcess, kSUnderS, kSUnderT, kSoftmaxSums };
KDOPS_FN void values_of(const SoftmaxSums& x, float (&values)[kSoftmaxSums]) {
  values[kZS] = x.z_s, values[kZT] = x.z_t, values[kDifference] = x.difference, values[kExcess] = x.excess;
  values[kSUnderS] = x.s_under_s, values[kSUnderT] = x.s_under_t;
}
// The sums of a row from its pieces, value(field, piece). There may be hundreds of pieces, so they are added in two
// numbers each.
template <class Value>
KDOPS_FN SoftmaxSums row_sums(int first, int stop, Value&& value) {
  Wide all[kSoftmaxSums] = {};
  for (int i = first; i < stop; ++i) {
#pragma unroll
    for (int f = 0; f < kSoftmaxSums; ++f) all[f] = moved(all[f], value(f, i));
  }
  const auto total = [&](int f) { return all[f].hi + all[f].lo; };
  return {total(kZS), total(kZT), total(kDifference), total(kExcess), total(kSUnderS), total(kSUnderT)};
}

// E_{p_S}[s] - E_{p_T}[s], and the divergence of the row.
KDOPS_FN float row_dot(const SoftmaxSums& sums) { return sums.s_under_s / sums.z_s - sums.s_under_t / sums.z_t; }
KDOPS_FN float log1p_less_its_argument(float w) {
  if (fabsf(w) > 0.125f) return log1pf(w) - w;
  float sum = 1 / 9.0f;
#pragma unroll
  for (int n = 8; n >= 2; --n) sum = 1.0f / n - w * sum;
  return -w * w * sum;
}
KDOPS_FN float row_divergence(const SoftmaxSums& sums, float offset) {
  const float w = (sums.excess - kLn2 * sums.difference) / sums.z_t;
  if (fabsf(w) < 0.5f) return sums.excess / sums.z_t + log1p_less_its_argument(w);
  return kLn2 * (sums.difference / sums.z_t + offset) + logf(sums.z_s / sums.z_t);
}

// dS = a e_S - b e_T - slope (s - mean) + rest, with the rounded mean; `rest` corrects its rounding.
struct GradientInputs {
  SoftmaxInputs in;
  float a, b, slope, mean, rest;
};
// Without normalisation (q is 0) the images of a channel are independent: NaN in one must not reach the others.
KDOPS_FN float slope_of(float r, float q, float projection) { return q == 0 ? 0.0f : r * r * q * projection; }
KDOPS_FN float gradient_of(const GradientInputs& g, float s, float t) {
  const float es = device::exp2((s - g.in.max_s) * g.in.k_s), et = device::exp2((t - g.in.max_t) * g.in.k_t);
  const float linear = g.slope == 0 ? 0.0f : g.slope * (s - g.mean) - g.rest;  // s may be -inf
  return (device::multiply(g.a, es) - device::multiply(g.b, et)) - linear;
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
  return softmax_inputs(p, stats(kCwdRS), stats(kCwdRT), stats(kCwdMaxS), stats(kCwdMaxT));
}

// grad_output times the factor of the row's gradient.
KDOPS_FN float row_grad(const Problem& p, const Level& level, int64_t row) {
  return p.grad_output == nullptr ? level.grad_scale : level.grad_scale * p.grad_output[row * p.grad_output_stride];
}

// `projection`: the sum of row_grad * dot over the images of the channel.
KDOPS_FN GradientInputs saved_gradient(const Problem& p, const Level& level, const CwdStats& stats, float projection) {
  const float r = stats(kCwdRS), outer = r * row_grad(p, level, stats.row);
  const float slope = slope_of(r, stats(kCwdQS), projection);
  return {softmax_inputs(p, stats), outer / stats(kCwdZS), outer / stats(kCwdZT), slope, stats(kCwdMeanS),
          slope * stats(kCwdMeanSLo)};
}

}  // namespace kdops::cuda
