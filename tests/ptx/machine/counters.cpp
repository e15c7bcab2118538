#include "counters.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace ptx {
namespace {

// The different units of `unit` bytes that lanes touch.
std::vector<u64> units(u32 lanes, const u64* addresses, int size, int unit) {
  std::vector<u64> all;
  for (; lanes; lanes &= lanes - 1) {
    const u64 a = addresses[std::countr_zero(lanes)];
    for (u64 u = a / unit; u <= (a + size - 1) / unit; ++u) all.push_back(u);
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

}  // namespace

void count_global(Counter& c, u32 lanes, const u64* addresses, int size) {
  const int active = std::popcount(lanes);
  c.lanes += active, c.bytes += static_cast<u64>(active) * size;
  c.sectors += units(lanes, addresses, size, 32).size();
  c.dense_sectors += (units(lanes, addresses, size, size).size() * size + 31) / 32;
}

// A wave serves each bank once; 8- and 16-byte accesses are served by halves and quarters of the warp.
void count_shared(Counter& c, u32 lanes, const u64* addresses, int size) {
  const int active = std::popcount(lanes);
  c.lanes += active, c.bytes += static_cast<u64>(active) * size;
  const int together = size >= 16 ? 8 : size == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += together) {
    const u32 part = together == 32 ? lanes : lanes & (((1u << together) - 1) << first);
    if (!part) continue;
    const std::vector<u64> words = units(part, addresses, size, 4);
    int in_bank[32] = {};
    for (const u64 word : words) ++in_bank[word % 32];
    c.waves += *std::max_element(in_bank, in_bank + 32);
    c.dense_waves += (words.size() + 31) / 32;
  }
}

}  // namespace ptx
