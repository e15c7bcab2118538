// PKD, the arithmetic of elements and channels that both layouts share.
//
// The distance r_S^2 SS + r_T^2 TT - 2 r_S r_T ST of the normalised maps cancels where the student is close to the
// teacher. With u = s - t, UV = SS - TT and the difference d = r_S - r_T of the factors it is also
//
//     distance = r_S r_T UU + d (r_S UV + d TT)
//     dot      = (distance + r_S^2 UV + d (r_S + r_T) TT) / 2
//
// which does not cancel if d is computed from UV: every term goes to 0 with u. It is used for maps whose scales are
// within a factor of 1.5, the first form for all others. Relative errors of the value of maps with s = a t + e |a t|
// noise, on every path:
//
//     e         1e-1   1e-2   1e-3   1e-4
//     a = 1     1e-7   1e-7   1e-7   1e-7
//     a = 0.95  2e-7   4e-6   5e-4   3e-2
//     a = 0.5   6e-6   1e-3   1e-1   1
#pragma once

#include "numbers.h"

namespace kdops::cuda {

// dS = alpha (s - mean_s) - beta (t - mean_t) + rest, with rounded means; `rest` corrects their rounding.
struct AffineInputs {
  float alpha, beta, mean_s, mean_t, rest;
};
KDOPS_FN float affine_of(const AffineInputs& a, float s, float t) {
  return (device::multiply(a.alpha, s - a.mean_s) - device::multiply(a.beta, t - a.mean_t)) + a.rest;
}

// The statistics of a channel, from its sums.
struct PkdChannelStats {
  Wide mean_s, mean_t;
  float r_s, r_t, q_s, dot, distance;
};
KDOPS_FN float factor_difference(const Problem& p, const Scale& s, const Scale& t, const CoMoments& m) {
  const float roots = s.root + t.root, freedom = p.norm == kBatchNorm ? m.count : m.count - 1.0f;
  return roots == 0 ? 0.0f : -s.r * t.r * (m.uv / (freedom * roots));
}
KDOPS_FN PkdChannelStats pkd_stats(const Problem& p, const CoMoments& m) {
  const Scale s = channel_scale(p.norm, p.eps, m.ss, m.count), t = channel_scale(p.norm, p.eps, m.tt, m.count);
  PkdChannelStats c = {m.s, m.t, s.r, t.r, s.q, 0, 0};
  if (2.0f * s.r < 3.0f * t.r && 2.0f * t.r < 3.0f * s.r) {
    const float d = factor_difference(p, s, t, m);
    c.r_t = s.r - d;  // the gradient depends on r_S - r_T, which UV gives accurately
    c.distance = s.r * t.r * m.uu + d * (s.r * m.uv + d * m.tt);
    c.dot = 0.5f * (c.distance + s.r * s.r * m.uv + d * (s.r + t.r) * m.tt);
  } else {
    c.dot = s.r * (s.r * m.ss - t.r * m.st);
    c.distance = c.dot + t.r * (t.r * m.tt - s.r * m.st);
  }
  return c;
}
KDOPS_FN AffineInputs pkd_affine(const PkdChannelStats& c, float grad) {
  const float outer = c.r_s * grad, alpha = outer * (c.r_s - c.q_s * c.dot), beta = outer * c.r_t;
  const float rest = device::multiply(beta, c.mean_t.lo) - device::multiply(alpha, c.mean_s.lo);
  return {alpha, beta, c.mean_s.hi, c.mean_t.hi, rest};
}
KDOPS_FN void write_pkd_channel(const Problem& p, const Level& level, int c, const PkdChannelStats& stats) {
  const int64_t at = level.first_channel + c;
  p.losses[at] = level.loss_scale * stats.distance;
  if (p.stats == nullptr) return;
  const float values[kPkdStats] = {stats.mean_s.hi, stats.r_s, stats.mean_t.hi, stats.r_t,
                                   stats.q_s,       stats.dot, stats.mean_s.lo, stats.mean_t.lo};
#pragma unroll
  for (int f = 0; f < kPkdStats; ++f) p.stats[f * p.rows + at] = values[f];
}

KDOPS_FN AffineInputs saved_affine(const Problem& p, const Level& level, int c) {
  const int64_t at = level.first_channel + c;
  const auto stat = [&](int field) { return p.stats[field * p.rows + at]; };
  const PkdChannelStats stats = {{stat(kPkdMeanS), stat(kPkdMeanSLo)},
                                 {stat(kPkdMeanT), stat(kPkdMeanTLo)},
                                 stat(kPkdRS),
                                 stat(kPkdRT),
                                 stat(kPkdQS),
                                 stat(kPkdDot),
                                 0};
  const float outside = p.grad_output == nullptr ? 1.0f : p.grad_output[at * p.grad_output_stride];
  return pkd_affine(stats, level.grad_scale * outside);
}

}  // namespace kdops::cuda
