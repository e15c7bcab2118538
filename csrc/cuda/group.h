// A group of blocks that share a channel, and the exchange of their partial results.
//
// Path 1: one block. Path 2: a thread-block cluster; results are in the shared memory of the block that computed them.
// Path 3: `group` blocks of a cooperative launch; results are in device memory. In each case a block gathers all
// results into a table of its own, so that the rest is the same for all paths and runs in a fixed order.
#pragma once

#include "group_layout.h"
#include "pieces.h"

namespace kdops::cuda {

template <bool kOnChip>
class Group {
 public:
  KDOPS_FN Group(const Problem& p, int image_fields, int fields)
      : p_(p), image_fields_(image_fields), fields_(fields), size_(p.group), rank_(device::block() % p.group),
        id_(device::block() / p.group), shared_(reinterpret_cast<float*>(device::shared_memory())) {}

  // The units of this group: several if the blocks are persistent, else one.
  KDOPS_FN int first_unit() const { return id_; }
  KDOPS_FN int unit_step() const { return device::blocks() / size_; }
  KDOPS_FN bool is_first() const { return rank_ == 0; }

  KDOPS_FN void enter(const Level& level) {
    pieces_ = level.batch * level.splits, own_pieces_ = (pieces_ + size_ - 1) / size_;
    layout_ = layout_of(level, image_fields_, fields_, size_, kOnChip);
    buffer_ = 1 - buffer_;
  }

  // Pieces of this warp: f(local, piece).
  template <class F>
  KDOPS_FN void each_piece(F&& f) const {
    for (int local = device::warp(); local < own_pieces_; local += device::warps()) {
      const int piece = local * size_ + rank_;
      if (piece < pieces_) f(local, piece);
    }
  }

  // Where a piece is read from: shared memory, to which `stage` copies it, or the maps.
  template <class T>
  KDOPS_FN Piece<T> piece(const Level& level, int c, int local, int index) const {
    const auto outside = piece_of<T>(level, c, index);
    return kOnChip ? staged(level, outside, slots(), local) : outside;
  }
  template <class T>
  KDOPS_FN void stage(const Level& level, int c) const {
    if (!kOnChip) return;
    each_piece([&](int local, int index) {
      start_copy(piece_of<T>(level, c, index), piece<T>(level, c, local, index));
    });
    each_piece([&](int local, int index) {
      copy_singles(piece_of<T>(level, c, index), piece<T>(level, c, local, index));
    });
  }
  // The first pass, f(piece, local, index): each piece as soon as it has arrived, while later copies are in flight.
  template <class T, class F>
  KDOPS_FN void each_arriving_piece(const Level& level, int c, F&& f) const {
    int open = 0;
    each_piece([&](int, int) { ++open; });
    each_piece([&](int local, int index) {
      if (kOnChip) device::wait_for_copies(--open);
      f(piece<T>(level, c, local, index), local, index);
    });
  }

  KDOPS_FN float* channel() const { return shared_; }
  KDOPS_FN float* images() const { return shared_ + layout_.images; }
  KDOPS_FN char* slots() const { return reinterpret_cast<char*>(shared_ + layout_.slots); }
  KDOPS_FN int pieces() const { return pieces_; }
  KDOPS_FN float get(int field, int piece) const { return shared_[layout_.table + field * pieces_ + piece]; }
  KDOPS_FN void put(int field, int local, int piece, float x) const {
    if (!kOnChip) {
      device::store_shared_between_blocks(outside(field, piece), x);
    } else if (size_ == 1) {
      shared_[layout_.table + field * pieces_ + piece] = x;
    } else {
      own(field)[local] = x;
    }
  }

  // Gathers the fields that all blocks of the group have put into the table of each. `last`: nothing is shared later.
  KDOPS_FN void share(int first_field, int count, bool last) {
    if (!kOnChip) {
      meet_in_memory();
    } else if (size_ == 1) {
      device::sync_block();
      return;
    } else {
      device::cluster_arrive();
      device::cluster_wait();
    }
    for (int i = device::thread(); i < count * pieces_; i += device::threads()) {
      const int field = first_field + i / pieces_, piece = i % pieces_;
      shared_[layout_.table + field * pieces_ + piece] =
          kOnChip ? *device::of_rank(own(field) + piece / size_, piece % size_)
                  : device::load_shared_between_blocks(outside(field, piece));
    }
    device::sync_block();
    if (kOnChip && last) device::cluster_arrive();
  }

  // A block's shared memory must outlast the reads of its cluster.
  KDOPS_FN void leave() const {
    if (kOnChip && size_ > 1) device::cluster_wait();
  }

 private:
  KDOPS_FN float* own(int field) const { return shared_ + layout_.own + field * own_pieces_; }
  KDOPS_FN float* outside(int field, int piece) const {
    return p_.parts + ((static_cast<int64_t>(id_) * 2 + buffer_) * fields_ + field) * p_.part_count + piece;
  }
  // All blocks of the group are resident at once, so the wait ends. Channels alternate between two buffers: one is
  // overwritten only after the next channel's barrier, which every block reaches after its gathering.
  KDOPS_FN void meet_in_memory() {
    meetings_ += 1;
    device::sync_block();
    if (device::thread() == 0) {
      device::arrive(p_.arrivals + id_);
      device::wait_for(p_.arrivals + id_, meetings_ * static_cast<unsigned>(size_));
    }
    device::sync_block();
  }

  const Problem& p_;
  const int image_fields_, fields_, size_, rank_, id_;
  float* const shared_;
  int pieces_ = 0, own_pieces_ = 0, buffer_ = 1;
  Layout layout_{};
  unsigned meetings_ = 0;
};

}  // namespace kdops::cuda
