// Vector clocks. A slot is a warp or an mbarrier; those of the blocks that run together are dense.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include "types.h"

namespace ptx {

class VectorClock {
 public:
  VectorClock() = default;
  explicit VectorClock(u32 base, size_t slots) : base_(base), own_(slots) {}

  u32 get(u32 slot) const {
    if (slot >= base_) return slot - base_ < own_.size() ? own_[slot - base_] : 0;
    const auto found = foreign_.find(slot);
    return found == foreign_.end() ? 0 : found->second;
  }
  void set(u32 slot, u32 clock) {
    if (slot - base_ >= own_.size()) own_.resize(slot - base_ + 1);
    own_[slot - base_] = std::max(own_[slot - base_], clock);
  }
  void join(const VectorClock& other) {
    if (other.base_ == base_) {
      if (own_.size() < other.own_.size()) own_.resize(other.own_.size());
      for (size_t i = 0; i < other.own_.size(); ++i) own_[i] = std::max(own_[i], other.own_[i]);
    } else {
      for (size_t i = 0; i < other.own_.size(); ++i)
        if (other.own_[i]) add(other.base_ + static_cast<u32>(i), other.own_[i]);
    }
    for (const auto& [slot, clock] : other.foreign_) add(slot, clock);
  }

 private:
  // Blocks run in the order of their bases, so another's slots lie below.
  void add(u32 slot, u32 clock) {
    if (slot >= base_) return set(slot, clock);
    u32& mine = foreign_[slot];
    mine = std::max(mine, clock);
  }
  u32 base_ = 0;
  std::vector<u32> own_;
  std::map<u32, u32> foreign_;  // of blocks that have ended, met through memory
};

// What is known to have happened; and the part of it that a proxy fence has made visible to asynchronous copies.
struct Knowledge {
  VectorClock seen, to_async_shared, to_async_global;
  bool proxies = false;

  void join(const Knowledge& other) {
    seen.join(other.seen);
    if (!proxies) return;
    to_async_shared.join(other.to_async_shared);
    to_async_global.join(other.to_async_global);
  }
};

}  // namespace ptx
