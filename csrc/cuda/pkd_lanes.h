// PKD, channels_last: two passes over the maps, 10 bytes an element in half precision.
// Not run on a GPU yet: arithmetic and indexing are tested on the host shim.
//
// Launches: pkd_lane_moments, pkd_lane_merge; then, or in the backward, pkd_lane_gradient.
#pragma once

#include "lanes.h"
#include "pkd_math.h"

namespace kdops::cuda {

template <class T>
KDOPS_KERNEL(kThreads, 4) pkd_lane_moments(KDOPS_PARAMETER Problem p) {
  const Level& level = level_of_block(p);
  const Tile tile = tile_of(level);
  LaneCoMoments lane[kLaneChannels];
  float count = 0;
  each_position<T>(level, tile, [&](const float (&s)[kLaneChannels], const float (&t)[kLaneChannels], int) {
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) {
      const float one_s[1] = {s[j]}, one_t[1] = {t[j]};
      lane[j].template add<1>(one_s, one_t, count == 0);
    }
    count += 1;
  });
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
    const CoMoments m = lane[j].moments(count);
    const float values[kPkdParts] = {m.mean_s, m.mean_t, m.ss, m.tt, m.st};
#pragma unroll
    for (int f = 0; f < kPkdParts; ++f)
      warp_result(kPkdParts, device::warp(), f, device::lane() * kLaneChannels + j) = values[f];
  }
  device::sync_block();
  const int c = device::thread(), channel = tile.channel - device::lane() * kLaneChannels + c;
  if (c >= kWarpChannels || channel >= level.channels) return;
  CoMoments all = {0, 0, 0, 0, 0, 0};
  for (int w = 0; w < kBlockWarps; ++w) {
    const auto value = [&](int field) { return warp_result(kPkdParts, w, field, c); };
    all = merged(all, {positions_of_warp(tile, w), value(kPartMeanOfS), value(kPartMeanOfT), value(kPartSumSS),
                       value(kPartSumTT), value(kPartSumST)});
  }
  const float values[kPkdParts] = {all.mean_s, all.mean_t, all.ss, all.tt, all.st};
#pragma unroll
  for (int f = 0; f < kPkdParts; ++f) part(p, level, f, tile.piece, channel) = values[f];
}

// 32 channels of a level for each block: a lane has one, the warps share its pieces. `group` blocks serve a level.
KDOPS_KERNEL(kThreads, 2) pkd_lane_merge(KDOPS_PARAMETER Problem p) {
  const Level& level = p.level[device::block() / p.group];
  const int c = device::block() % p.group * kLanes + device::lane(), lane = device::lane();
  if (device::block() % p.group * kLanes >= level.channels) return;
  CoMoments all = {0, 0, 0, 0, 0, 0};
  for (int i = device::warp(); c < level.channels && i < level.batch * level.splits; i += kBlockWarps) {
    const auto value = [&](int field) { return part(p, level, field, i, c); };
    all = merged(all, {static_cast<float>(length_of(level, i)), value(kPartMeanOfS), value(kPartMeanOfT),
                       value(kPartSumSS), value(kPartSumTT), value(kPartSumST)});
  }
  const float values[6] = {all.count, all.mean_s, all.mean_t, all.ss, all.tt, all.st};
#pragma unroll
  for (int f = 0; f < 6; ++f) warp_result(6, device::warp(), f, lane) = values[f];
  device::sync_block();
  if (device::warp() > 0 || c >= level.channels) return;
  all = {0, 0, 0, 0, 0, 0};
  for (int w = 0; w < kBlockWarps; ++w) {
    const auto value = [&](int field) { return warp_result(6, w, field, lane); };
    all = merged(all, {value(0), value(1), value(2), value(3), value(4), value(5)});
  }
  write_pkd_channel(p, level, c, pkd_stats(p, all));
}

template <class T>
KDOPS_KERNEL(kThreads, 4) pkd_lane_gradient(KDOPS_PARAMETER Problem p) {
  const Level& level = level_of_block(p);
  const Tile tile = tile_of(level);
  AffineInputs a[kLaneChannels] = {};
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j)
    if (j < tile.channels) a[j] = saved_affine(p, level, tile.channel + j);
  const LaneMap<T> grad(level, level.grad, tile);
  each_position<T>(level, tile, [&](const float (&s)[kLaneChannels], const float (&t)[kLaneChannels], int i) {
    float out[kLaneChannels];
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) out[j] = affine_of(a[j], s[j], t[j]);
    grad.store(i, out);
  });
}

}  // namespace kdops::cuda
