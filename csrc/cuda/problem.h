// The argument of the CUDA kernels, without PyTorch: a call's levels by value in one kernel parameter.
#pragma once

#include <cstdint>

namespace kdops::cuda {

constexpr int kMaxLevels = 8;
constexpr int kLanes = 32;
constexpr int kThreads = 256;  // of a block
constexpr int kChannelBlocks = 3;  // of paths 1 to 3 that should be resident on a multiprocessor: 80 registers a thread

enum Norm : int { kNoNorm = 0, kBatchNorm = 1, kPkdNorm = 2 };
enum Path : int { kBlock = 1, kCluster = 2, kWaves = 3, kChannelsLast = 4 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A map; strides in elements. Height and width are one dimension of positions.
struct Map {
  void* data;
  int64_t stride_n, stride_c, stride_p;
};

// One pyramid level. A row (n, c) is divided into `splits` pieces of `chunk` positions; a warp (channels_last: a block)
// processes one piece at a time. A unit is the work of a group of blocks: a channel, or for channels_last the channels
// of a warp.
struct Level {
  Map student, teacher, grad;
  int batch, channels, positions;
  int splits, chunk;
  int first_unit;
  bool aligned;  // rows of all its maps have the same misalignment, so that they can be read in vectors
  int64_t first_row, first_channel, first_part;
  float loss_scale, grad_scale;  // of a row (CWD) or channel (PKD)
};

struct Problem {
  Level level[kMaxLevels];
  int levels;
  int units;
  int group;  // blocks that share a unit
  int norm;
  float eps, inv_tau;
  float* stats;   // [fields][rows], or null
  float* losses;  // one per row (CWD) or channel (PKD)
  int64_t rows;   // stride of a field of `stats`: rows (CWD) or channels (PKD) of all levels
  float* parts;   // partial results in device memory, path 3 and 4
  int64_t part_count;  // stride of their fields
  unsigned* arrivals;        // one counter per group, zero at the start: path 3
  const float* grad_output;  // null: 1
  int64_t grad_output_stride;
  bool want_grads;
};

// Fields of the statistics saved for backward; docs/design/notation.md has their formulas.
// A mean is stored as two numbers, the second (Lo) the rounding error of the first.
enum CwdStat { kCwdMeanS, kCwdRS, kCwdRT, kCwdQS, kCwdMaxS, kCwdMaxT, kCwdZS, kCwdZT, kCwdDot, kCwdMeanSLo, kCwdStats };
enum PkdStat { kPkdMeanS, kPkdRS, kPkdMeanT, kPkdRT, kPkdQS, kPkdDot, kPkdMeanSLo, kPkdMeanTLo, kPkdStats };

// Elements that one lane reads at once: 16 bytes.
template <class T>
constexpr int kPack = 16 / sizeof(T);

}  // namespace kdops::cuda
