// PKD, element by element and channel by channel: what both layouts share.
#pragma once

#include "numbers.h"

namespace kdops::cuda {

// Partial results of a piece.
enum PkdPart { kPartMeanOfS, kPartMeanOfT, kPartSumSS, kPartSumTT, kPartSumST, kPkdParts };

// dS = alpha (s - mean_s) - beta (t - mean_t)
struct AffineInputs {
  float alpha, beta, mean_s, mean_t;
};
KDOPS_FN float affine_of(const AffineInputs& a, float s, float t) {
  return a.alpha * (s - a.mean_s) - a.beta * (t - a.mean_t);
}

// From the sums over a channel to its statistics.
struct PkdChannelStats {
  float mean_s, r_s, mean_t, r_t, q_s, dot, distance;
};
KDOPS_FN PkdChannelStats pkd_stats(const Problem& p, const CoMoments& m) {
  const Scale s = channel_scale(p.norm, p.eps, m.ss, m.count), t = channel_scale(p.norm, p.eps, m.tt, m.count);
  const float ss = s.r * s.r * m.ss, st = s.r * t.r * m.st;
  return {m.mean_s, s.r, m.mean_t, t.r, s.q, ss - st, ss + t.r * t.r * m.tt - 2 * st};
}
KDOPS_FN AffineInputs pkd_affine(const PkdChannelStats& c, float grad) {
  const float outer = c.r_s * grad;
  return {outer * (c.r_s - c.q_s * c.dot), outer * c.r_t, c.mean_s, c.mean_t};
}
KDOPS_FN void write_pkd_channel(const Problem& p, const Level& level, int c, const PkdChannelStats& stats) {
  const int64_t at = level.first_channel + c;
  p.losses[at] = level.loss_scale * stats.distance;
  if (p.stats == nullptr) return;
  const float values[kPkdStats] = {stats.mean_s, stats.r_s, stats.mean_t, stats.r_t, stats.q_s, stats.dot};
#pragma unroll
  for (int f = 0; f < kPkdStats; ++f) p.stats[f * p.rows + at] = values[f];
}

KDOPS_FN AffineInputs saved_affine(const Problem& p, const Level& level, int c) {
  const int64_t at = level.first_channel + c;
  const auto stat = [&](int field) { return p.stats[field * p.rows + at]; };
  const PkdChannelStats stats = {stat(kPkdMeanS), stat(kPkdRS), stat(kPkdMeanT), stat(kPkdRT), stat(kPkdQS),
                                 stat(kPkdDot),   0};
  const float outside = p.grad_output == nullptr ? 1.0f : p.grad_output[at * p.grad_output_stride];
  return pkd_affine(stats, level.grad_scale * outside);
}

}  // namespace kdops::cuda
