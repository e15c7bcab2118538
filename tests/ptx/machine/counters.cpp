#include "counters.h"

#include <algorithm>
#include <array>
#include <bit>

namespace ptx {
namespace {

// The different units of bytes that lanes touch: at most nine of 4 bytes for 32.
struct Units {
  std::array<u64, 32 * 9> all;
  size_t count = 0;

  Units(u32 lanes, const u64* addresses, int size, int unit) {
    for (; lanes; lanes &= lanes - 1) {
      const u64 a = addresses[std::countr_zero(lanes)];
      for (u64 u = a / unit; u <= (a + size - 1) / unit; ++u) all[count++] = u;
    }
    std::sort(all.begin(), all.begin() + count);
    count = static_cast<size_t>(std::unique(all.begin(), all.begin() + count) - all.begin());
  }
};

}  // namespace

void count_global(Counter& c, u32 lanes, const u64* addresses, int size) {
  const int active = std::popcount(lanes);
  c.lanes += active, c.bytes += static_cast<u64>(active) * size;
  c.sectors += Units(lanes, addresses, size, 32).count;
  c.dense_sectors += (Units(lanes, addresses, size, size).count * size + 31) / 32;
}

// A wave serves each bank once; 8- and 16-byte accesses are served by halves and quarters of the warp.
void count_shared(Counter& c, u32 lanes, const u64* addresses, int size) {
  const int active = std::popcount(lanes);
  c.lanes += active, c.bytes += static_cast<u64>(active) * size;
  const int together = size >= 16 ? 8 : size == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += together) {
    const u32 part = together == 32 ? lanes : lanes & (((1u << together) - 1) << first);
    if (!part) continue;
    const Units words(part, addresses, size, 4);
    int in_bank[32] = {};
    for (size_t i = 0; i < words.count; ++i) ++in_bank[words.all[i] % 32];
    c.waves += *std::max_element(in_bank, in_bank + 32);
    c.dense_waves += (words.count + 31) / 32;
  }
}

}  // namespace ptx
