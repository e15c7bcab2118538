// PKD, NCHW: one visit to a channel for its co-moments, one for the gradient, on the skeleton of cwd_channels.h.
// Not run on a GPU yet: arithmetic and indexing are tested on the host shim.
//
// 6 bytes an element in half precision on chip, 10 in waves (of which 4 from the L2 cache), with the gradient.
#pragma once

#include "group.h"

namespace kdops::cuda {

enum PkdPart { kPartMeanOfS, kPartMeanOfT, kPartSumSS, kPartSumTT, kPartSumST, kPkdParts };
enum PkdValue { kPkdAlpha, kPkdBeta, kPkdCentreS, kPkdCentreT };
constexpr int kPkdImages = 0;

// dS = alpha (s - mean_s) - beta (t - mean_t)
struct AffineInputs {
  float alpha, beta, mean_s, mean_t;
};

template <bool kOnChip, class T>
KDOPS_FN void write_affine(const Piece<T>& piece, const AffineInputs& a) {
  each_pack(piece, [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    float s[V], t[V], out[V];
    load<kOnChip, V>(piece.student + i, s);
    load<kOnChip, V>(piece.teacher + i, t);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = a.alpha * (s[j] - a.mean_s) - a.beta * (t[j] - a.mean_t);
    store<V>(piece.grad + i, out);
  });
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

template <class T, bool kOnChip>
class PkdChannel {
 public:
  KDOPS_FN PkdChannel(const Problem& p) : p_(p), group_(p, kPkdImages, kPkdParts) {}

  KDOPS_FN void run() {
    for (int unit = group_.first_unit(); unit < p_.units; unit += group_.unit_step()) {
      const Level& level = level_of(p_, unit);
      group_.enter(level);
      const int c = unit - level.first_unit;
      group_.template stage<T>(level, c);
      moments(level, c);
      group_.share(0, kPkdParts, true);
      finish(level, c);
      if (p_.want_grads) gradients(level, c);
    }
    group_.leave();
  }

 private:
  KDOPS_FN void moments(const Level& level, int c) const {
    group_.template each_arriving_piece<T>(level, c, [&](const Piece<T>& x, int local, int index) {
      LaneCoMoments lane;
      float count = 0;
      each_pack(x, [&](auto width, int i) {
        constexpr int V = decltype(width)::value;
        float s[V], t[V];
        load<kOnChip, V>(x.student + i, s);
        load<kOnChip, V>(x.teacher + i, t);
        lane.template add<V>(s, t, count == 0);
        count += V;
      });
      const CoMoments m = warp_merged(lane.moments(count));
      if (device::lane() == 0) {
        group_.put(kPartMeanOfS, local, index, m.mean_s);
        group_.put(kPartMeanOfT, local, index, m.mean_t);
        group_.put(kPartSumSS, local, index, m.ss);
        group_.put(kPartSumTT, local, index, m.tt);
        group_.put(kPartSumST, local, index, m.st);
      }
    });
  }

  KDOPS_FN void finish(const Level& level, int c) const {
    if (device::warp() == 0) {
      CoMoments all = {0, 0, 0, 0, 0, 0};
      for (int i = device::lane(); i < group_.pieces(); i += kLanes) {
        all = merged(all, {static_cast<float>(length_of(level, i)), group_.get(kPartMeanOfS, i),
                           group_.get(kPartMeanOfT, i), group_.get(kPartSumSS, i), group_.get(kPartSumTT, i),
                           group_.get(kPartSumST, i)});
      }
      all = warp_merged(all);
      if (device::lane() == 0) {
        const PkdChannelStats stats = pkd_stats(p_, all);
        const AffineInputs affine = pkd_affine(stats, level.grad_scale);
        float* channel = group_.channel();
        channel[kPkdAlpha] = affine.alpha, channel[kPkdBeta] = affine.beta;
        channel[kPkdCentreS] = affine.mean_s, channel[kPkdCentreT] = affine.mean_t;
        if (group_.is_first()) write_pkd_channel(p_, level, c, stats);
      }
    }
    device::sync_block();
  }

  KDOPS_FN void gradients(const Level& level, int c) const {
    const float* channel = group_.channel();
    const AffineInputs affine = {channel[kPkdAlpha], channel[kPkdBeta], channel[kPkdCentreS], channel[kPkdCentreT]};
    group_.each_piece([&](int local, int index) {
      write_affine<kOnChip>(group_.template piece<T>(level, c, local, index), affine);
    });
  }

  const Problem& p_;
  Group<kOnChip> group_;
};

template <class T, bool kOnChip>
KDOPS_KERNEL(kThreads, 2) pkd_channels(KDOPS_PARAMETER Problem p) {
  PkdChannel<T, kOnChip>(p).run();
}

KDOPS_FN AffineInputs saved_affine(const Problem& p, const Level& level, int c) {
  const int64_t at = level.first_channel + c;
  const auto stat = [&](int field) { return p.stats[field * p.rows + at]; };
  const PkdChannelStats stats = {stat(kPkdMeanS), stat(kPkdRS), stat(kPkdMeanT), stat(kPkdRT), stat(kPkdQS),
                                 stat(kPkdDot),   0};
  return pkd_affine(stats, level.grad_scale * p.grad_output[at * p.grad_output_stride]);
}

// The gradient from saved statistics: one pass. A warp takes one piece of a row.
template <class T>
KDOPS_KERNEL(kThreads, 4) pkd_backward(KDOPS_PARAMETER Problem p) {
  const int unit = device::block() / p.group, part = device::block() % p.group;
  const Level& level = level_of(p, unit);
  const int c = unit - level.first_unit, step = p.group * device::warps();
  const AffineInputs affine = saved_affine(p, level, c);
  for (int i = part * device::warps() + device::warp(); i < level.batch * level.splits; i += step)
    write_affine<false>(piece_of<T>(level, c, i), affine);
}

}  // namespace kdops::cuda
