// PKD, channels_last: two passes over the maps, 10 bytes an element in half precision.
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
  float values[kLaneChannels][kCoMoments];
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) values_of(lane[j].moments(count), values[j]);
#pragma unroll
  for (int f = 0; f < kCoMoments; ++f) put_warp_result(kCoMoments, f, {values[0][f], values[1][f]});
  device::sync_block();
  const int c = device::thread(), channel = tile.channel - device::lane() * kLaneChannels + c;
  if (c >= kWarpChannels || channel >= level.channels) return;
  CoMoments all{};
  for (int w = 0; w < kBlockWarps; ++w)
    all = merged(all, comoments_from(positions_of_warp(tile, w), [&](int f) {
                   return warp_result(kCoMoments, w, f, c);
                 }));
  float merged_values[kCoMoments];
  values_of(all, merged_values);
#pragma unroll
  for (int f = 0; f < kCoMoments; ++f) part(p, level, f, tile.piece, channel) = merged_values[f];
}

// A block merges 32 channels of a level, one per lane; its warps share the pieces. A level has `group` blocks.
KDOPS_KERNEL(kThreads, 2) pkd_lane_merge(KDOPS_PARAMETER Problem p) {
  constexpr int kFields = kCoMoments + 1;  // the count first
  const Level& level = p.level[device::block() / p.group];
  const int c = device::block() % p.group * kLanes + device::lane(), lane = device::lane();
  if (device::block() % p.group * kLanes >= level.channels) return;
  CoMoments all{};
  for (int i = device::warp(); c < level.channels && i < level.batch * level.splits; i += kBlockWarps)
    all = merged(all, comoments_from(length_of(level, i), [&](int f) { return part(p, level, f, i, c); }));
  float values[kCoMoments];
  values_of(all, values);
  warp_result(kFields, device::warp(), 0, lane) = all.count;
#pragma unroll
  for (int f = 0; f < kCoMoments; ++f) warp_result(kFields, device::warp(), 1 + f, lane) = values[f];
  device::sync_block();
  if (device::warp() > 0 || c >= level.channels) return;
  all = {};
  for (int w = 0; w < kBlockWarps; ++w)
    all = merged(all, comoments_from(warp_result(kFields, w, 0, lane), [&](int f) {
                   return warp_result(kFields, w, 1 + f, lane);
                 }));
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
