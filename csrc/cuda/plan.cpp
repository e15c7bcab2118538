#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "group_layout.h"

namespace kdops::cuda {
namespace {

constexpr int kWarps = kThreads / kLanes;
constexpr int kMostPieces = 512;      // of a channel, to keep their table small
constexpr int kPieceOverhead = 3;     // of a piece, in steps of a warp: reductions and prologues
constexpr int kReservedShared = 1024;  // bytes that the system reserves in each block
// The share of L2 for maps that later passes read again: on large GPUs with two partitions, half of it may duplicate
// the other half, and gradients pass through half of the rest.
constexpr double kShareOfL2 = 0.22;
// A cooperative launch leaves one in this many multiprocessors to other kernels: it starts only once all of its blocks
// have room, while NCCL's kernels, for example, keep theirs until every rank has arrived. If others hold more, the
// launch and everything after it in its stream wait for them, and ranks that issue their collectives in different
// orders could deadlock. The driver rejects a launch that can never have room (see run).
constexpr int kLeftToOthers = 8;

[[noreturn]] void refuse(const std::string& reason) { throw std::invalid_argument(reason); }

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Divides rows so that `warps` warps finish their pieces at about the same time.
void cut(Level& level, int warps, int pack) {
  const int most = std::max(1, std::min({level.positions / (kLanes * pack), kMostPieces / level.batch, 2 * warps}));
  int64_t least = INT64_MAX;
  for (int wanted = 1; wanted <= most; ++wanted) {
    const int chunk = ceil_div(ceil_div(level.positions, wanted), pack) * pack;
    const int splits = ceil_div(level.positions, chunk);
    const int64_t steps = ceil_div(chunk, kLanes * pack) + kPieceOverhead;
    const int64_t cost = ceil_div(level.batch * splits, warps) * steps;
    if (cost < least) least = cost, level.splits = splits, level.chunk = chunk;
  }
}

// Shared memory of a block, for rows divided for groups of this size.
int shared_bytes(const Problem& p, const LossKernels& kernels, bool on_chip) {
  int most = 0;
  for (int i = 0; i < p.levels; ++i) {
    const Level& level = p.level[i];
    const Layout layout = layout_of(level, kernels.fields.images, kernels.fields.parts, p.group, on_chip);
    const int64_t own = ceil_div(level.batch * level.splits, p.group);
    const int64_t staged = on_chip ? 2 * own * slot_bytes(level.chunk, kernels.element_bytes) : 0;
    most = static_cast<int>(std::max<int64_t>(most, std::min<int64_t>(4 * layout.slots + staged, INT32_MAX)));
  }
  return most;
}

void cut_all(Problem& p, int group, const LossKernels& kernels) {
  p.group = group, p.units = 0, p.part_count = 0;
  for (int i = 0; i < p.levels; ++i) {
    Level& level = p.level[i];
    cut(level, group * kWarps, 16 / kernels.element_bytes);
    level.first_unit = p.units;
    p.units += level.channels;
    p.part_count = std::max<int64_t>(p.part_count, level.batch * level.splits);
  }
}

Launch plan_block(Problem& p, const LossKernels& kernels) {
  cut_all(p, 1, kernels);
  const int bytes = shared_bytes(p, kernels, true);
  if (bytes > device_limits().shared_per_block || resident_blocks(kernels.on_chip, kThreads, bytes) == 0)
    refuse("a channel takes " + std::to_string(bytes) + " bytes on chip, a block has " +
           std::to_string(device_limits().shared_per_block));
  return {p.units, kThreads, bytes, 1, false};
}

// The smallest cluster with two resident blocks per multiprocessor, so that one loads while the other computes; else
// the smallest that fits at all.
Launch plan_cluster(Problem& p, const LossKernels& kernels) {
  const Device& device = device_limits();
  if (device.architecture < 90) refuse("thread-block clusters need compute capability 9.0");
  const int code = code_architecture(kernels.on_chip);
  if (code < 90)
    refuse("thread-block clusters need code for compute capability 9.0, these kernels were compiled for " +
           std::to_string(code / 10) + "." + std::to_string(code % 10));
  const int half = device.shared_per_multiprocessor / 2 - kReservedShared;
  for (const int limit : {half, device.shared_per_block}) {
    for (const int cluster : {2, 4, 8, 16}) {
      cut_all(p, cluster, kernels);
      const Launch launch = {p.units * cluster, kThreads, shared_bytes(p, kernels, true), cluster, false};
      if (launch.shared_bytes <= limit && resident_clusters(kernels.on_chip, launch) > 0) return launch;
    }
  }
  refuse("no cluster of this device holds a channel");
}

Launch plan_waves(Problem& p, const LossKernels& kernels) {
  const Device& device = device_limits();
  cut_all(p, 1, kernels);
  int64_t channel_bytes = 0;
  int most_blocks = 1;  // that have work in a channel
  for (int i = 0; i < p.levels; ++i) {
    const Level& level = p.level[i];
    const int64_t bytes = int64_t(2) * level.batch * level.positions * kernels.element_bytes;
    channel_bytes = std::max(channel_bytes, bytes);
    most_blocks = std::max<int>(most_blocks, std::min<int64_t>(bytes / (2 * 16 * kThreads), INT32_MAX));
    p.level[i].splits = std::max(1, kMostPieces / level.batch);  // for the largest possible table
  }
  const int bytes = shared_bytes(p, kernels, false);
  const int resident = std::min(kChannelBlocks, resident_blocks(kernels.in_waves, kThreads, bytes));
  if (resident == 0) refuse("the table of a channel's images does not fit on chip");
  const int multiprocessors = device.multiprocessors - ceil_div(device.multiprocessors, kLeftToOthers);
  if (multiprocessors == 0) refuse("a device of one multiprocessor has none to spare");
  const int blocks = resident * multiprocessors;
  const int64_t in_cache = static_cast<int64_t>(kShareOfL2 * device.l2_bytes) / channel_bytes;
  const int groups = static_cast<int>(std::clamp<int64_t>(in_cache, 1, std::min(p.units, blocks)));
  const int group = std::min(blocks / groups, most_blocks);
  cut_all(p, group, kernels);
  return {std::min(p.units, group < blocks / groups ? blocks / group : groups) * group, kThreads, bytes, 1, true};
}

}  // namespace

Launch plan_channels(Problem& p, Path path, const LossKernels& kernels) {
  switch (path) {
    case kBlock: return plan_block(p, kernels);
    case kCluster: return plan_cluster(p, kernels);
    case kWaves: return plan_waves(p, kernels);
    default: refuse("path " + std::to_string(path) + " is not one of whole channels");
  }
}

Launch plan_backward(Problem& p, const LossKernels& kernels) {
  constexpr int kSteps = 8;  // of a warp over a piece
  p.units = 0, p.group = 1;
  const int pack = 16 / kernels.element_bytes;
  for (int i = 0; i < p.levels; ++i) {
    Level& level = p.level[i];
    level.splits = ceil_div(level.positions, kSteps * kLanes * pack);
    level.chunk = ceil_div(ceil_div(level.positions, level.splits), pack) * pack;
    level.splits = ceil_div(level.positions, level.chunk);
    level.first_unit = p.units;
    p.units += level.channels;
    p.group = std::max(p.group, ceil_div(level.batch * level.splits, 2 * kWarps));
  }
  return {p.units * p.group, kThreads, 0, 1, false};
}

Launch plan_lanes(Problem& p, const LaneKernels& kernels) {
  constexpr int kChannels = 2 * kLanes, kLeastPositions = 4 * kWarps, kBlocksWanted = 16;  // for each multiprocessor
  int64_t blocks = 0, tiles = 0;
  for (int i = 0; i < p.levels; ++i)
    tiles += int64_t(p.level[i].batch) * p.level[i].positions * ceil_div(p.level[i].channels, kChannels);
  const int64_t wanted = std::max<int64_t>(kLeastPositions, tiles / (kBlocksWanted * device_limits().multiprocessors));
  p.part_count = 0;
  for (int i = 0; i < p.levels; ++i) {
    Level& level = p.level[i];
    level.splits = ceil_div(level.positions, static_cast<int>(std::min<int64_t>(wanted, level.positions)));
    level.chunk = ceil_div(level.positions, level.splits);
    level.splits = ceil_div(level.positions, level.chunk);
    level.first_unit = static_cast<int>(blocks), level.first_part = p.part_count;
    const int64_t pieces = int64_t(level.batch) * level.splits;
    blocks += pieces * ceil_div(level.channels, kChannels);
    p.part_count += pieces * level.channels;
    if (blocks > INT32_MAX) refuse("the maps need more than 2^31 blocks");
  }
  return {static_cast<int>(blocks), kThreads, kernels.warp_results * kWarps * kChannels * int(sizeof(float)), 1, false};
}

Launch per_level(Problem& p, int blocks, const LaneKernels& kernels) {
  p.group = blocks;
  return {blocks * p.levels, kThreads, kernels.warp_results * kWarps * 2 * kLanes * int(sizeof(float)), 1, false};
}

}  // namespace kdops::cuda
