// Layout of a block's shared memory on paths 1 to 3, for the kernels and the host side.
#pragma once

#include "problem.h"

#ifdef __CUDACC__
#define KDOPS_BOTH __host__ __device__ inline
#else
#define KDOPS_BOTH inline
#endif

namespace kdops::cuda {

constexpr int kChannelFloats = 8;

// Offsets in floats: channel values, values per image, the table of all pieces, a cluster block's own results, and the
// staged pieces.
struct Layout {
  int images, table, own, slots;
};
KDOPS_BOTH Layout layout_of(const Level& level, int image_fields, int fields, int group, bool on_chip) {
  const int pieces = level.batch * level.splits, own_pieces = (pieces + group - 1) / group;
  Layout layout;
  layout.images = kChannelFloats;
  layout.table = layout.images + image_fields * level.batch;
  layout.own = layout.table + fields * pieces;
  layout.slots = (layout.own + (on_chip && group > 1 ? fields * own_pieces : 0) + 3) / 4 * 4;
  return layout;
}

// Bytes for a piece of one map, which keeps its misalignment in shared memory.
KDOPS_BOTH int slot_bytes(int chunk, int element_bytes) { return chunk * element_bytes + 16; }

}  // namespace kdops::cuda
