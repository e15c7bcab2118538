// What is known of each byte of memory: who wrote and read it last, and whether a copy is under way.
#pragma once

#include <vector>

#include "types.h"

namespace ptx {

enum CellFlag : u8 {
  kWritten = 1,       // by somebody of this launch
  kRead = 2,
  kCopyTarget = 4,    // an asynchronous copy will write it
  kForeignRead = 8,   // the last reader is of blocks that have ended
  kByAsync = 16,      // the last writer was an asynchronous copy
  kBarrierObject = 32,
  kSplit = 64,        // a word whose bytes differ
  kStrongWrite = 128,  // the last write was atomic or volatile
};

struct Event {
  u32 slot = 0, clock = 0, pc = 0;
};
struct Cell {
  Event write, read;
  i32 readers = -1;  // several unordered readers; of a split word, its bytes
  u8 write_lane = 0, read_lane = 0, flags = 0;
  u8 copies_from = 0;  // asynchronous copies that have yet to read it
};

// A cell per word of 4 bytes, and one per byte where a word is not accessed as a whole.
class Shadow {
 public:
  Shadow() = default;
  explicit Shadow(size_t bytes) : words_((bytes + 3) / 4) {}
  bool empty() const { return words_.empty(); }

  // Calls f(cell, offset, bytes) for the cells of a range.
  template <class F>
  void each(size_t offset, size_t size, F&& f) {
    for (size_t end = offset + size; offset < end;) {
      Cell& word = words_[offset / 4];
      if (offset % 4 == 0 && end - offset >= 4 && !(word.flags & kSplit)) {
        f(word, offset, 4);
        offset += 4;
        continue;
      }
      if (!(word.flags & kSplit)) split(word);
      f(bytes_[4 * word.readers + offset % 4], offset, 1);
      ++offset;
    }
  }

 private:
  void split(Cell& word) {
    const i32 index = static_cast<i32>(bytes_.size() / 4);
    const Cell copy = word;
    bytes_.insert(bytes_.end(), 4, copy);
    word.flags = kSplit;
    word.readers = index;
  }
  std::vector<Cell> words_, bytes_;
};

}  // namespace ptx
