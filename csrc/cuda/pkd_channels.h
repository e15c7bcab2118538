// PKD, NCHW: one pass over a channel for its co-moments, one for the gradient, structured like cwd_channels.h.
//
// 6 bytes an element in half precision on chip, 10 in waves (of which 4 from the L2 cache), with the gradient.
#pragma once

#include "group.h"
#include "pkd_math.h"

namespace kdops::cuda {

enum PkdValue { kPkdAlpha, kPkdBeta, kPkdCentreS, kPkdCentreT, kPkdRest };
constexpr int kPkdImages = 0;

template <bool kOnChip, class T>
KDOPS_FN void write_affine(const Piece<T>& piece, const AffineInputs& a) {
  each_pack(piece, [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    float s[V], t[V], out[V];
    load<kOnChip, V>(piece.student + i, s);
    load<kOnChip, V>(piece.teacher + i, t);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = affine_of(a, s[j], t[j]);
    store<V>(piece.grad + i, out);
  });
}

template <class T, bool kOnChip>
class PkdChannel {
 public:
  KDOPS_FN PkdChannel(const Problem& p) : p_(p), group_(p, kPkdImages, kCoMoments) {}

  KDOPS_FN void run() {
    for (int unit = group_.first_unit(); unit < p_.units; unit += group_.unit_step()) {
      const Level& level = level_of(p_, unit);
      group_.enter(level);
      const int c = unit - level.first_unit;
      group_.template stage<T>(level, c);
      moments(level, c);
      group_.share(0, kCoMoments, true);
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
      float values[kCoMoments];
      values_of(warp_merged(lane.moments(count)), values);
      if (device::lane() == 0) {
#pragma unroll
        for (int f = 0; f < kCoMoments; ++f) group_.put(f, local, index, values[f]);
      }
    });
  }

  KDOPS_FN void finish(const Level& level, int c) const {
    if (device::warp() == 0) {
      CoMoments all{};
      for (int i = device::lane(); i < group_.pieces(); i += kLanes)
        all = merged(all, comoments_from(length_of(level, i), [&](int f) { return group_.get(f, i); }));
      all = warp_merged(all);
      if (device::lane() == 0) {
        const PkdChannelStats stats = pkd_stats(p_, all);
        const AffineInputs affine = pkd_affine(stats, level.grad_scale);
        float* channel = group_.channel();
        channel[kPkdAlpha] = affine.alpha, channel[kPkdBeta] = affine.beta;
        channel[kPkdCentreS] = affine.mean_s, channel[kPkdCentreT] = affine.mean_t, channel[kPkdRest] = affine.rest;
        if (group_.is_first()) write_pkd_channel(p_, level, c, stats);
      }
    }
    device::sync_block();
  }

  KDOPS_FN void gradients(const Level& level, int c) const {
    const float* channel = group_.channel();
    const AffineInputs affine = {channel[kPkdAlpha], channel[kPkdBeta], channel[kPkdCentreS], channel[kPkdCentreT],
                                 channel[kPkdRest]};
    group_.each_piece([&](int local, int index) {
      write_affine<kOnChip>(group_.template piece<T>(level, c, local, index), affine);
    });
  }

  const Problem& p_;
  Group<kOnChip> group_;
};

template <class T, bool kOnChip>
KDOPS_KERNEL(kThreads, kChannelBlocks) pkd_channels(KDOPS_PARAMETER Problem p) {
  PkdChannel<T, kOnChip>(p).run();
}

// The gradient from saved statistics, in one pass. A warp processes one piece of a row at a time.
template <class T>
KDOPS_KERNEL(kThreads, kChannelBlocks) pkd_backward(KDOPS_PARAMETER Problem p) {
  const int unit = device::block() / p.group, part = device::block() % p.group;
  const Level& level = level_of(p, unit);
  const int c = unit - level.first_unit, step = p.group * device::warps();
  const AffineInputs affine = saved_affine(p, level, c);
  for (int i = part * device::warps() + device::warp(); i < level.batch * level.splits; i += step)
    write_affine<false>(piece_of<T>(level, c, i), affine);
}

}  // namespace kdops::cuda
