// Channel-wise distillation, channels_last: three passes over the maps, 14 bytes an element in half precision.
// Not run on a GPU yet: arithmetic and indexing are tested on the host shim.
//
// Launches: cwd_lane_moments, cwd_lane_merge, cwd_lane_sums, cwd_lane_finish; then, or in the backward,
// cwd_lane_gradient.
#pragma once

#include "cwd_math.h"
#include "lanes.h"

namespace kdops::cuda {

enum LaneMoment { kLaneMeanS, kLaneM2S, kLaneMaxS, kLaneMeanT, kLaneM2T, kLaneMaxT, kLaneMoments };
enum LaneSum { kLaneZS, kLaneZT, kLaneDivergence, kLaneSS, kLaneTS, kLaneSums };

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
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    const int c = device::lane() * kLaneChannels + j, w = device::warp();
    const Moments s = student[j].moments(count), t = teacher[j].moments(count);
    warp_result(kLaneMoments, w, kLaneMeanS, c) = s.mean, warp_result(kLaneMoments, w, kLaneM2S, c) = s.m2;
    warp_result(kLaneMoments, w, kLaneMeanT, c) = t.mean, warp_result(kLaneMoments, w, kLaneM2T, c) = t.m2;
    warp_result(kLaneMoments, w, kLaneMaxS, c) = max_s[j], warp_result(kLaneMoments, w, kLaneMaxT, c) = max_t[j];
  }
  device::sync_block();
  // Threads 0 to 127: student, then teacher, of one channel each.
  const int c = device::thread() % kWarpChannels, map = device::thread() / kWarpChannels;
  const int channel = tile.channel - device::lane() * kLaneChannels + c;
  if (map > 1 || channel >= level.channels) return;
  const int mean = map ? kLaneMeanT : kLaneMeanS;
  Moments all = {0, 0, 0};
  float most = -INFINITY;
  for (int w = 0; w < kBlockWarps; ++w) {
    all = merged(all, {positions_of_warp(tile, w), warp_result(kLaneMoments, w, mean, c),
                       warp_result(kLaneMoments, w, mean + 1, c)});
    most = greater(warp_result(kLaneMoments, w, mean + 2, c), most);
  }
  part(p, level, mean, tile.piece, channel) = all.mean;
  part(p, level, mean + 1, tile.piece, channel) = all.m2;
  part(p, level, mean + 2, tile.piece, channel) = most;
}

// 32 channels of a level for each block: a lane has one, the warps share its pieces. `group` blocks serve a level.
KDOPS_KERNEL(kThreads, 2) cwd_lane_merge(KDOPS_PARAMETER Problem p) {
  const Level& level = p.level[device::block() / p.group];
  const int c = device::block() % p.group * kLanes + device::lane(), w = device::warp();
  if (device::block() % p.group * kLanes >= level.channels) return;
  const bool exists = c < level.channels;
  Moments maps[2] = {{0, 0, 0}, {0, 0, 0}};
  for (int i = w; exists && i < level.batch * level.splits; i += kBlockWarps) {
    const float count = length_of(level, i);
    maps[0] = merged(maps[0], {count, part(p, level, kLaneMeanS, i, c), part(p, level, kLaneM2S, i, c)});
    maps[1] = merged(maps[1], {count, part(p, level, kLaneMeanT, i, c), part(p, level, kLaneM2T, i, c)});
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    warp_result(6, w, 3 * m, device::lane()) = maps[m].count;
    warp_result(6, w, 3 * m + 1, device::lane()) = maps[m].mean;
    warp_result(6, w, 3 * m + 2, device::lane()) = maps[m].m2;
  }
  device::sync_block();
  if (!exists) return;
  maps[0] = maps[1] = {0, 0, 0};
  for (int from = 0; from < kBlockWarps; ++from) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      maps[m] = merged(maps[m], {warp_result(6, from, 3 * m, device::lane()),
                                 warp_result(6, from, 3 * m + 1, device::lane()),
                                 warp_result(6, from, 3 * m + 2, device::lane())});
  }
  const Scale s = channel_scale(p.norm, p.eps, maps[0].m2, maps[0].count);
  const Scale t = channel_scale(p.norm, p.eps, maps[1].m2, maps[1].count);
  for (int n = w; n < level.batch; n += kBlockWarps) {
    float max_s = -INFINITY, max_t = -INFINITY;
    for (int i = n * level.splits; i < (n + 1) * level.splits; ++i) {
      max_s = greater(part(p, level, kLaneMaxS, i, c), max_s), max_t = greater(part(p, level, kLaneMaxT, i, c), max_t);
    }
    const CwdStats stats(p, level, n, c);
    stats(kCwdMeanS) = p.norm == kNoNorm ? 0.0f : maps[0].mean;
    stats(kCwdRS) = s.r, stats(kCwdRT) = t.r, stats(kCwdQS) = s.q;
    stats(kCwdMaxS) = max_s, stats(kCwdMaxT) = max_t;
  }
}

template <class T>
KDOPS_KERNEL(kThreads, 4) cwd_lane_sums(KDOPS_PARAMETER Problem p) {
  const Level& level = level_of_block(p);
  const Tile tile = tile_of(level);
  SoftmaxSums sums[kLaneChannels];
  SoftmaxInputs in[kLaneChannels] = {};
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j)
    if (j < tile.channels) in[j] = softmax_inputs(p, CwdStats(p, level, tile.image, tile.channel + j));
  each_position<T>(level, tile, [&](const float (&s)[kLaneChannels], const float (&t)[kLaneChannels], int) {
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) add_softmax(sums[j], in[j], s[j], t[j]);
  });
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    const SoftmaxSums& x = sums[j];
    const float values[kLaneSums] = {x.z_s, x.z_t, x.divergence, x.s_under_s, x.s_under_t};
#pragma unroll
    for (int f = 0; f < kLaneSums; ++f)
      warp_result(kLaneSums, device::warp(), f, device::lane() * kLaneChannels + j) = values[f];
  }
  device::sync_block();
  for (int i = device::thread(); i < kLaneSums * kWarpChannels; i += kThreads) {
    const int field = i / kWarpChannels, c = i % kWarpChannels;
    const int channel = tile.channel - device::lane() * kLaneChannels + c;
    if (channel >= level.channels) continue;
    float all = 0;
    for (int w = 0; w < kBlockWarps; ++w) all += warp_result(kLaneSums, w, field, c);
    part(p, level, field, tile.piece, channel) = all;
  }
}

// A row for each thread. `group` blocks serve a level.
KDOPS_KERNEL(kThreads, 4) cwd_lane_finish(KDOPS_PARAMETER Problem p) {
  const Level& level = p.level[device::block() / p.group];
  const int64_t at = static_cast<int64_t>(device::block() % p.group) * kThreads + device::thread();
  if (at >= static_cast<int64_t>(level.batch) * level.channels) return;
  const int n = static_cast<int>(at / level.channels), c = static_cast<int>(at % level.channels);
  SoftmaxSums sums;
  for (int i = n * level.splits; i < (n + 1) * level.splits; ++i) {
    sums.z_s += part(p, level, kLaneZS, i, c), sums.z_t += part(p, level, kLaneZT, i, c);
    sums.divergence += part(p, level, kLaneDivergence, i, c);
    sums.s_under_s += part(p, level, kLaneSS, i, c), sums.s_under_t += part(p, level, kLaneTS, i, c);
  }
  const CwdStats stats(p, level, n, c);
  stats(kCwdZS) = sums.z_s, stats(kCwdZT) = sums.z_t, stats(kCwdDot) = row_dot(sums);
  p.losses[level.first_row + at] = level.loss_scale * row_divergence(sums);
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
