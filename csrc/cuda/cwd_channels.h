// Channel-wise distillation, NCHW: a group of blocks computes moments, softmax sums and gradient of a channel.
//
// On chip (paths 1 and 2) student and teacher are read from memory once: 6 bytes an element in half precision with the
// gradient, 4 without. In waves (path 3) they are read three times, the second and third time from the L2 cache, as
// long as the channels in flight fit into it.
#pragma once

#include "cwd_math.h"
#include "group.h"

namespace kdops::cuda {

// Partial results of a piece, values of each image of the channel, and values of the channel.
enum CwdPart { kPartMeanS, kPartMeanSLo, kPartM2S, kPartMaxS, kPartMeanT, kPartMeanTLo, kPartM2T, kPartMaxT,
               kMomentParts, kCwdParts = kMomentParts + kSoftmaxSums };
enum CwdImage { kImageMaxS, kImageMaxT, kImageA, kImageB, kImageDot, kCwdImages };
enum CwdValue { kChannelMeanS, kChannelMeanSLo, kChannelRS, kChannelRT, kChannelQS, kChannelCentreS, kChannelCentreT };

template <bool kOnChip, class T>
KDOPS_FN void write_gradient(const Piece<T>& piece, const GradientInputs& g) {
  each_pack(piece, [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    float s[V], t[V], out[V];
    load<kOnChip, V>(piece.student + i, s);
    load<kOnChip, V>(piece.teacher + i, t);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = gradient_of(g, s[j], t[j]);
    store<V>(piece.grad + i, out);
  });
}

template <class T, bool kOnChip>
class CwdChannel {
 public:
  KDOPS_FN CwdChannel(const Problem& p) : p_(p), group_(p, kCwdImages, kCwdParts) {}

  KDOPS_FN void run() {
    for (int unit = group_.first_unit(); unit < p_.units; unit += group_.unit_step()) {
      const Level& level = level_of(p_, unit);
      group_.enter(level);
      const int c = unit - level.first_unit;
      group_.template stage<T>(level, c);
      moments(level, c);
      group_.share(kPartMeanS, kMomentParts, false);
      merge_moments(level);
      softmax(level, c);
      group_.share(kMomentParts, kSoftmaxSums, true);
      finish_images(level, c);
      if (p_.want_grads) gradients(level, c);
    }
    group_.leave();
  }

 private:
  KDOPS_FN void moments(const Level& level, int c) const {
    group_.template each_arriving_piece<T>(level, c, [&](const Piece<T>& x, int local, int index) {
      LaneMoments student, teacher;
      float count = 0, max_s = -INFINITY, max_t = -INFINITY;
      each_pack(x, [&](auto width, int i) {
        constexpr int V = decltype(width)::value;
        float s[V], t[V];
        load<kOnChip, V>(x.student + i, s);
        load<kOnChip, V>(x.teacher + i, t);
        student.template add<V>(s, count == 0);
        teacher.template add<V>(t, count == 0);
#pragma unroll
        for (int j = 0; j < V; ++j) max_s = greater(s[j], max_s), max_t = greater(t[j], max_t);
        count += V;
      });
      const Moments ms = warp_merged(student.moments(count)), mt = warp_merged(teacher.moments(count));
      max_s = warp_max(max_s), max_t = warp_max(max_t);
      if (device::lane() == 0) {
        group_.put(kPartMeanS, local, index, ms.mean.hi);
        group_.put(kPartMeanSLo, local, index, ms.mean.lo);
        group_.put(kPartM2S, local, index, ms.m2);
        group_.put(kPartMaxS, local, index, max_s);
        group_.put(kPartMeanT, local, index, mt.mean.hi);
        group_.put(kPartMeanTLo, local, index, mt.mean.lo);
        group_.put(kPartM2T, local, index, mt.m2);
        group_.put(kPartMaxT, local, index, max_t);
      }
    });
  }

  KDOPS_FN Moments merged_pieces(const Level& level, int mean_part) const {
    Moments all = {0, {0, 0}, 0};
    for (int i = device::lane(); i < group_.pieces(); i += kLanes)
      all = merged(all, {static_cast<float>(length_of(level, i)),
                         {group_.get(mean_part, i), group_.get(mean_part + 1, i)},
                         group_.get(mean_part + 2, i)});
    return warp_merged(all);
  }

  KDOPS_FN void merge_moments(const Level& level) const {
    float* channel = group_.channel();
    if (device::warp() == 0) {
      const Moments s = merged_pieces(level, kPartMeanS), t = merged_pieces(level, kPartMeanT);
      if (device::lane() == 0) {
        const Scale scale_s = channel_scale(p_.norm, p_.eps, s.m2, s.count);
        const Scale scale_t = channel_scale(p_.norm, p_.eps, t.m2, t.count);
        const Wide mean = p_.norm == kNoNorm ? Wide{0, 0} : s.mean;
        channel[kChannelMeanS] = mean.hi, channel[kChannelMeanSLo] = mean.lo;
        channel[kChannelCentreS] = s.mean.hi, channel[kChannelCentreT] = t.mean.hi;
        channel[kChannelRS] = scale_s.r, channel[kChannelRT] = scale_t.r, channel[kChannelQS] = scale_s.q;
      }
    }
    for (int n = device::thread(); n < level.batch; n += device::threads()) {
      float max_s = -INFINITY, max_t = -INFINITY;
      for (int i = n * level.splits; i < (n + 1) * level.splits; ++i) {
        max_s = greater(group_.get(kPartMaxS, i), max_s), max_t = greater(group_.get(kPartMaxT, i), max_t);
      }
      image(level, kImageMaxS, n) = max_s, image(level, kImageMaxT, n) = max_t;
    }
    device::sync_block();
  }

  KDOPS_FN SoftmaxInputs inputs(const Level& level, int n) const {
    const float* channel = group_.channel();
    return softmax_inputs(p_, channel[kChannelRS], channel[kChannelRT], image(level, kImageMaxS, n),
                          image(level, kImageMaxT, n));
  }
  KDOPS_FN float offset(const SoftmaxInputs& in) const {
    return row_offset(in, group_.channel()[kChannelCentreS], group_.channel()[kChannelCentreT]);
  }

  KDOPS_FN void softmax(const Level& level, int c) const {
    group_.each_piece([&](int local, int index) {
      const auto x = group_.template piece<T>(level, c, local, index);
      const SoftmaxInputs softmax = inputs(level, x.image);
      const SumInputs in = sum_inputs(softmax, offset(softmax));
      SoftmaxSums sums;
      each_pack(x, [&](auto width, int i) {
        constexpr int V = decltype(width)::value;
        float s[V], t[V];
        load<kOnChip, V>(x.student + i, s);
        load<kOnChip, V>(x.teacher + i, t);
#pragma unroll
        for (int j = 0; j < V; ++j) add_softmax(sums, in, s[j], t[j]);
      });
      float values[kSoftmaxSums];
      values_of(sums, values);
#pragma unroll
      for (int f = 0; f < kSoftmaxSums; ++f) {
        const float all = warp_sum(values[f]);
        if (device::lane() == 0) group_.put(kMomentParts + f, local, index, all);
      }
    });
  }

  // Values of each row; the first block of the group writes them to memory.
  KDOPS_FN void finish_images(const Level& level, int c) const {
    const float* channel = group_.channel();
    for (int n = device::thread(); n < level.batch; n += device::threads()) {
      const SoftmaxSums sums = row_sums(n * level.splits, (n + 1) * level.splits,
                                        [&](int f, int i) { return group_.get(kMomentParts + f, i); });
      const float dot = row_dot(sums);
      image(level, kImageA, n) = 1.0f / sums.z_s, image(level, kImageB, n) = 1.0f / sums.z_t;
      image(level, kImageDot, n) = dot;
      if (!group_.is_first()) continue;
      const CwdStats stats(p_, level, n, c);
      p_.losses[stats.row] = level.loss_scale * row_divergence(sums, offset(inputs(level, n)));
      if (p_.stats == nullptr) continue;
      stats(kCwdMeanS) = channel[kChannelMeanS], stats(kCwdMeanSLo) = channel[kChannelMeanSLo];
      stats(kCwdRS) = channel[kChannelRS];
      stats(kCwdRT) = channel[kChannelRT], stats(kCwdQS) = channel[kChannelQS];
      stats(kCwdMaxS) = image(level, kImageMaxS, n), stats(kCwdMaxT) = image(level, kImageMaxT, n);
      stats(kCwdZS) = sums.z_s, stats(kCwdZT) = sums.z_t, stats(kCwdDot) = dot;
    }
    device::sync_block();
  }

  KDOPS_FN void gradients(const Level& level, int c) const {
    const float* channel = group_.channel();
    float dot = 0;
    for (int n = device::lane(); n < level.batch; n += kLanes) dot += image(level, kImageDot, n);
    const float r = channel[kChannelRS], outer = r * level.grad_scale;
    const float slope = slope_of(r, channel[kChannelQS], level.grad_scale * warp_sum(dot));
    group_.each_piece([&](int local, int index) {
      const auto x = group_.template piece<T>(level, c, local, index);
      const GradientInputs g = {inputs(level, x.image), outer * image(level, kImageA, x.image),
                                outer * image(level, kImageB, x.image), slope, channel[kChannelMeanS],
                                slope * channel[kChannelMeanSLo]};
      write_gradient<kOnChip>(x, g);
    });
  }

  KDOPS_FN float& image(const Level& level, int field, int n) const { return group_.images()[field * level.batch + n]; }

  const Problem& p_;
  Group<kOnChip> group_;
};

template <class T, bool kOnChip>
KDOPS_KERNEL(kThreads, kChannelBlocks) cwd_channels(KDOPS_PARAMETER Problem p) {
  CwdChannel<T, kOnChip>(p).run();
}

// The gradient from saved statistics, in one pass. A warp processes one piece of a row at a time.
template <class T>
KDOPS_KERNEL(kThreads, kChannelBlocks) cwd_backward(KDOPS_PARAMETER Problem p) {
  const int unit = device::block() / p.group, part = device::block() % p.group;
  const Level& level = level_of(p, unit);
  const int c = unit - level.first_unit, step = p.group * device::warps();
  float projection = 0;
  for (int n = device::lane(); n < level.batch; n += kLanes) {
    const CwdStats stats(p, level, n, c);
    projection += row_grad(p, level, stats.row) * stats(kCwdDot);
  }
  projection = warp_sum(projection);
  for (int i = part * device::warps() + device::warp(); i < level.batch * level.splits; i += step) {
    const auto x = piece_of<T>(level, c, i);
    write_gradient<false>(x, saved_gradient(p, level, CwdStats(p, level, x.image, c), projection));
  }
}

}  // namespace kdops::cuda
