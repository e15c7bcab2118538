// Channel-wise distillation, channels_last: three passes over the maps, 14 bytes an element in half precision.
//
// Launches: cwd_lane_moments, cwd_lane_merge, cwd_lane_sums, cwd_lane_finish; then, or in the backward,
// cwd_lane_gradient.
#pragma once

#include "cwd_math.h"
#include "lanes.h"

namespace kdops::cuda {

enum LaneMoment { kLaneMeanS, kLaneMeanSLo, kLaneM2S, kLaneMaxS, kLaneMeanT, kLaneMeanTLo, kLaneM2T, kLaneMaxT,
                  kLaneMoments };
constexpr int kCwdOffset = kCwdDot;  // of a row, in the slot of its dot product until cwd_lane_finish writes that

template <class T>
KDOPS_KERNEL(kThreads, 4) cwd_lane_moments(KDOPS_PARAMETER Problem p) {
  const Level& level = level_of_block(p);
  const Tile tile = tile_of(level);
  LaneMoments student[kLaneChannels], teacher[kLaneChannels];
  float max_s[kLaneChannels] = {-INFINITY, -INFINITY}, max_t[kLaneChannels] = {-INFINITY, -INFINITY}, count = 0;
  each_position<T>(level, tile, [&](const float (&s)[kLaneChannels], const float (&t)[kLaneChannels], int) {
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) {
      const float one_s[1] = {s[j]}, one_t[1] = {t[j]};
      student[j].template add<1>(one_s, count == 0), teacher[j].template add<1>(one_t, count == 0);
      max_s[j] = greater(s[j], max_s[j]), max_t[j] = greater(t[j], max_t[j]);
    }
    count += 1;
  });
  float values[kLaneChannels][kLaneMoments];
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    const Moments s = student[j].moments(count), t = teacher[j].moments(count);
    const float all[kLaneMoments] = {s.mean.hi, s.mean.lo, s.m2, max_s[j], t.mean.hi, t.mean.lo, t.m2, max_t[j]};
#pragma unroll
    for (int f = 0; f < kLaneMoments; ++f) values[j][f] = all[f];
  }
#pragma unroll
  for (int f = 0; f < kLaneMoments; ++f) put_warp_result(kLaneMoments, f, {values[0][f], values[1][f]});
  device::sync_block();
  // Threads 0 to 127: student, then teacher, of one channel each.
  const int c = device::thread() % kWarpChannels, map = device::thread() / kWarpChannels;
  const int channel = tile.channel - device::lane() * kLaneChannels + c;
  if (map > 1 || channel >= level.channels) return;
  const int first = map ? kLaneMeanT : kLaneMeanS;
  Moments all = {0, {0, 0}, 0};
  float most = -INFINITY;
  for (int w = 0; w < kBlockWarps; ++w) {
    const auto value = [&](int f) { return warp_result(kLaneMoments, w, first + f, c); };
    all = merged(all, {positions_of_warp(tile, w), {value(0), value(1)}, value(2)});
    most = greater(value(3), most);
  }
  const float merged_values[kLaneMoments / 2] = {all.mean.hi, all.mean.lo, all.m2, most};
#pragma unroll
  for (int f = 0; f < kLaneMoments / 2; ++f) part(p, level, first + f, tile.piece, channel) = merged_values[f];
}

// A block merges 32 channels of a level, one per lane; its warps share the pieces. A level has `group` blocks.
KDOPS_KERNEL(kThreads, 2) cwd_lane_merge(KDOPS_PARAMETER Problem p) {
  constexpr int kFields = 4;  // of a map: count, mean and its rest, m2
  const Level& level = p.level[device::block() / p.group];
  const int c = device::block() % p.group * kLanes + device::lane(), w = device::warp();
  if (device::block() % p.group * kLanes >= level.channels) return;
  const bool exists = c < level.channels;
  Moments maps[2] = {};
  for (int i = w; exists && i < level.batch * level.splits; i += kBlockWarps) {
    const float count = length_of(level, i);
    const auto value = [&](int f) { return part(p, level, f, i, c); };
    maps[0] = merged(maps[0], {count, {value(kLaneMeanS), value(kLaneMeanSLo)}, value(kLaneM2S)});
    maps[1] = merged(maps[1], {count, {value(kLaneMeanT), value(kLaneMeanTLo)}, value(kLaneM2T)});
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const float values[kFields] = {maps[m].count, maps[m].mean.hi, maps[m].mean.lo, maps[m].m2};
#pragma unroll
    for (int f = 0; f < kFields; ++f) warp_result(2 * kFields, w, kFields * m + f, device::lane()) = values[f];
  }
  device::sync_block();
  if (!exists) return;
  maps[0] = maps[1] = {};
  for (int from = 0; from < kBlockWarps; ++from) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const auto value = [&](int f) { return warp_result(2 * kFields, from, kFields * m + f, device::lane()); };
      maps[m] = merged(maps[m], {value(0), {value(1), value(2)}, value(3)});
    }
  }
  const Scale s = channel_scale(p.norm, p.eps, maps[0].m2, maps[0].count);
  const Scale t = channel_scale(p.norm, p.eps, maps[1].m2, maps[1].count);
  const Wide mean = p.norm == kNoNorm ? Wide{0, 0} : maps[0].mean;
  for (int n = w; n < level.batch; n += kBlockWarps) {
    float max_s = -INFINITY, max_t = -INFINITY;
    for (int i = n * level.splits; i < (n + 1) * level.splits; ++i) {
      max_s = greater(part(p, level, kLaneMaxS, i, c), max_s), max_t = greater(part(p, level, kLaneMaxT, i, c), max_t);
    }
    const CwdStats stats(p, level, n, c);
    stats(kCwdMeanS) = mean.hi, stats(kCwdMeanSLo) = mean.lo;
    stats(kCwdRS) = s.r, stats(kCwdRT) = t.r, stats(kCwdQS) = s.q;
    stats(kCwdMaxS) = max_s, stats(kCwdMaxT) = max_t;
    stats(kCwdOffset) = row_offset(softmax_inputs(p, stats), maps[0].mean.hi, maps[1].mean.hi);
  }
}

template <class T>
KDOPS_KERNEL(kThreads, 4) cwd_lane_sums(KDOPS_PARAMETER Problem p) {
  const Level& level = level_of_block(p);
  const Tile tile = tile_of(level);
  SoftmaxSums sums[kLaneChannels];
  SumInputs in[kLaneChannels] = {};
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    if (j >= tile.channels) continue;
    const CwdStats stats(p, level, tile.image, tile.channel + j);
    in[j] = sum_inputs(softmax_inputs(p, stats), stats(kCwdOffset));
  }
  each_position<T, 2>(level, tile, [&](const float (&s)[kLaneChannels], const float (&t)[kLaneChannels], int) {
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) add_softmax(sums[j], in[j], s[j], t[j]);
  });
  float values[kLaneChannels][kSoftmaxSums];
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) values_of(sums[j], values[j]);
#pragma unroll
  for (int f = 0; f < kSoftmaxSums; ++f) put_warp_result(kSoftmaxSums, f, {values[0][f], values[1][f]});
  device::sync_block();
  for (int i = device::thread(); i < kSoftmaxSums * kWarpChannels; i += kThreads) {
    const int field = i / kWarpChannels, c = i % kWarpChannels;
    const int channel = tile.channel - device::lane() * kLaneChannels + c;
    if (channel >= level.channels) continue;
    float all = 0;
    for (int w = 0; w < kBlockWarps; ++w) all += warp_result(kSoftmaxSums, w, field, c);
    part(p, level, field, tile.piece, channel) = all;
  }
}

// One row per thread. A level has `group` blocks.
KDOPS_KERNEL(kThreads, 4) cwd_lane_finish(KDOPS_PARAMETER Problem p) {
  const Level& level = p.level[device::block() / p.group];
  const int64_t at = static_cast<int64_t>(device::block() % p.group) * kThreads + device::thread();
  if (at >= static_cast<int64_t>(level.batch) * level.channels) return;
  const int n = static_cast<int>(at / level.channels), c = static_cast<int>(at % level.channels);
  const SoftmaxSums sums = row_sums(n * level.splits, (n + 1) * level.splits,
                                    [&](int f, int i) { return part(p, level, f, i, c); });
  const CwdStats stats(p, level, n, c);
  p.losses[level.first_row + at] = level.loss_scale * row_divergence(sums, stats(kCwdOffset));
  stats(kCwdZS) = sums.z_s, stats(kCwdZT) = sums.z_t, stats(kCwdDot) = row_dot(sums);
}

template <class T>
KDOPS_KERNEL(kThreads, 4) cwd_lane_gradient(KDOPS_PARAMETER Problem p) {
  const Level& level = level_of_block(p);
  const Tile tile = tile_of(level);
  GradientInputs g[kLaneChannels] = {};
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    if (j >= tile.channels) continue;
    const int c = tile.channel + j;
    float projection = 0;
    for (int n = 0; n < level.batch; ++n) {
      const CwdStats stats(p, level, n, c);
      projection += row_grad(p, level, stats.row) * stats(kCwdDot);
    }
    g[j] = saved_gradient(p, level, CwdStats(p, level, tile.image, c), projection);
  }
  const LaneMap<T> grad(level, level.grad, tile);
  each_position<T>(level, tile, [&](const float (&s)[kLaneChannels], const float (&t)[kLaneChannels], int i) {
    float out[kLaneChannels];
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) out[j] = gradient_of(g[j], s[j], t[j]);
    grad.store(i, out);
  });
}

}  // namespace kdops::cuda
