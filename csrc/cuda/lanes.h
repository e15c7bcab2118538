// channels_last: a lane has two neighbouring channels, a warp 64; positions are dealt to the warps of a block in turn.
#pragma once

#include "numbers.h"

namespace kdops::cuda {

constexpr int kLaneChannels = 2;
constexpr int kWarpChannels = kLaneChannels * kLanes;
constexpr int kBlockWarps = kThreads / kLanes;

// The work of a block: positions of one image, of 64 channels.
struct Tile {
  int image, piece, start, stop;
  int channel;  // of this lane, the first of two
  int channels;  // of this lane that exist: 2, 1 or 0
};

KDOPS_FN const Level& level_of_block(const Problem& p) {
  int i = 0;
  while (i + 1 < p.levels && device::block() >= p.level[i + 1].first_unit) ++i;
  return p.level[i];
}

KDOPS_FN Tile tile_of(const Level& level) {
  const int across = (level.channels + kWarpChannels - 1) / kWarpChannels, at = device::block() - level.first_unit;
  Tile tile;
  tile.piece = at / across, tile.image = tile.piece / level.splits;
  tile.start = tile.piece % level.splits * level.chunk;
  const int stop = tile.start + level.chunk;
  tile.stop = stop < level.positions ? stop : level.positions;
  tile.channel = at % across * kWarpChannels + device::lane() * kLaneChannels;
  const int left = level.channels - tile.channel;
  tile.channels = left < 0 ? 0 : left < kLaneChannels ? left : kLaneChannels;
  return tile;
}

// The lane's channels of one map of the image.
template <class T>
class LaneMap {
 public:
  KDOPS_FN LaneMap(const Level& level, const Map& map, const Tile& tile)
      : first_(static_cast<T*>(map.data) + tile.image * map.stride_n + tile.channel), step_(map.stride_p),
        channels_(tile.channels), pairs_(level.aligned && tile.channels == kLaneChannels) {}

  KDOPS_FN void load(int position, float (&x)[kLaneChannels]) const {
    const T* p = first_ + position * step_;
    if (pairs_) {
      kdops::cuda::load<false, kLaneChannels>(p, x);
      return;
    }
    for (int i = 0; i < kLaneChannels; ++i) x[i] = i < channels_ ? device::widen(device::load_global<T>(p + i)) : 0.0f;
  }
  KDOPS_FN void store(int position, const float (&x)[kLaneChannels]) const {
    T* p = first_ + position * step_;
    if (pairs_) {
      kdops::cuda::store<kLaneChannels>(p, x);
      return;
    }
    for (int i = 0; i < channels_; ++i) {
      const float single[1] = {x[i]};
      kdops::cuda::store<1>(p + i, single);
    }
  }

 private:
  T* const first_;
  const int64_t step_;
  const int channels_;
  const bool pairs_;
};

// Calls f(s, t, position) for this warp's positions, `kUnroll` of them at a time: as many as registers allow.
template <class T, int kUnroll = 4, class F>
KDOPS_FN void each_position(const Level& level, const Tile& tile, F&& f) {
  const LaneMap<T> student(level, level.student, tile), teacher(level, level.teacher, tile);
#pragma unroll kUnroll
  for (int i = tile.start + device::warp(); i < tile.stop; i += kBlockWarps) {
    float s[kLaneChannels], t[kLaneChannels];
    student.load(i, s);
    teacher.load(i, t);
    f(s, t, i);
  }
}

KDOPS_FN float positions_of_warp(const Tile& tile, int warp) {
  const int left = tile.stop - tile.start - warp;
  return left <= 0 ? 0 : (left + kBlockWarps - 1) / kBlockWarps;
}

// Results of each warp and channel in shared memory, to be combined in a fixed order.
KDOPS_FN float& warp_result(int fields, int warp, int field, int channel) {
  float* shared = reinterpret_cast<float*>(device::shared_memory());
  return shared[(warp * fields + field) * kWarpChannels + channel];
}

// All channels of a lane at once: one by one they would use only half of the memory banks.
KDOPS_FN void put_warp_result(int fields, int field, const float (&x)[kLaneChannels]) {
  Pack<float, kLaneChannels> pack;
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) pack.x[j] = x[j];
  device::store_shared(&warp_result(fields, device::warp(), field, device::lane() * kLaneChannels), pack);
}

KDOPS_FN float& part(const Problem& p, const Level& level, int field, int piece, int channel) {
  return p.parts[field * p.part_count + level.first_part + static_cast<int64_t>(piece) * level.channels + channel];
}

}  // namespace kdops::cuda
