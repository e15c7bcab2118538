// Pieces of rows: their addresses, a warp's loop over them, and their copies on chip.
#pragma once

#include "group_layout.h"
#include "numbers.h"

namespace kdops::cuda {

// Part of a row of student, teacher and gradient. `head` elements precede the first full vector.
template <class T>
struct Piece {
  const T *student, *teacher;
  T* grad;
  int image, length, head;
};

KDOPS_FN const Level& level_of(const Problem& p, int unit) {
  int i = 0;
  while (i + 1 < p.levels && unit >= p.level[i + 1].first_unit) ++i;
  return p.level[i];
}

template <class T>
KDOPS_FN T* element(const Map& map, int n, int c, int64_t position) {
  return static_cast<T*>(map.data) + n * map.stride_n + c * map.stride_c + position * map.stride_p;
}

// Elements past the last 16-byte boundary.
template <class T>
KDOPS_FN int phase_of(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kPack<T>);
}

template <class T>
KDOPS_FN Piece<T> piece_of(const Level& level, int channel, int piece) {
  const int n = piece / level.splits, start = piece % level.splits * level.chunk;
  const int length = length_of(level, piece);
  const T* student = element<const T>(level.student, n, channel, start);
  const int head = level.aligned ? (kPack<T> - phase_of(student)) % kPack<T> : length;
  return {student, element<const T>(level.teacher, n, channel, start), element<T>(level.grad, n, channel, start),
          n,       length, head < length ? head : length};
}

template <int V>
struct Width {
  static constexpr int value = V;
};

// Calls f(Width<V>, i) for all packs of V elements from i on: single elements at the ends, full vectors in between.
// A lane gets the same packs every time.
template <class T, class F>
KDOPS_FN void each_pack(const Piece<T>& piece, F&& f) {
  constexpr int V = kPack<T>;
  const int vectors = (piece.length - piece.head) / V, singles = piece.length - vectors * V;
  for (int i = device::lane(); i < singles; i += kLanes) f(Width<1>{}, i < piece.head ? i : i + vectors * V);
#pragma unroll 2
  for (int i = device::lane(); i < vectors; i += kLanes) f(Width<V>{}, piece.head + i * V);
}

template <class T>
KDOPS_FN T* in_slot(const Level& level, const T* global, char* slot) {
  return reinterpret_cast<T*>(slot) + (level.aligned ? phase_of(global) : 0);
}

template <class T>
KDOPS_FN Piece<T> staged(const Level& level, const Piece<T>& piece, char* slots, int local) {
  const int bytes = slot_bytes(level.chunk, sizeof(T));
  char* slot = slots + 2 * local * bytes;
  Piece<T> on_chip = piece;
  on_chip.student = in_slot(level, piece.student, slot);
  on_chip.teacher = in_slot(level, piece.teacher, slot + bytes);
  return on_chip;
}

// Starts the copies of a piece's vectors. A lane copies what it will read itself, so that no barrier is needed.
template <class T>
KDOPS_FN void start_copy(const Piece<T>& from, const Piece<T>& to) {
  constexpr int V = kPack<T>;
  const int vectors = (from.length - from.head) / V;
  for (int i = device::lane(); i < vectors; i += kLanes) {
    const int at = from.head + i * V;
    device::copy_16_async(const_cast<T*>(to.student) + at, from.student + at);
    device::copy_16_async(const_cast<T*>(to.teacher) + at, from.teacher + at);
  }
  device::close_copy_group();
}
// The elements outside full vectors: the ends of misaligned rows.
template <class T>
KDOPS_FN void copy_singles(const Piece<T>& from, const Piece<T>& to) {
  constexpr int V = kPack<T>;
  const int vectors = (from.length - from.head) / V, singles = from.length - vectors * V;
#pragma unroll 2
  for (int i = device::lane(); i < singles; i += kLanes) {
    const int at = i < from.head ? i : i + vectors * V;
    const_cast<T*>(to.student)[at] = device::load_global<T>(from.student + at);
    const_cast<T*>(to.teacher)[at] = device::load_global<T>(from.teacher + at);
  }
}

}  // namespace kdops::cuda
