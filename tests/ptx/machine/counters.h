// What each instruction moved.
#pragma once

#include "types.h"

namespace ptx {

struct Counter {
  u64 executed = 0, lanes = 0, bytes = 0;
  u64 sectors = 0, dense_sectors = 0;  // of 32 bytes, global memory: touched, and needed at least
  u64 waves = 0, dense_waves = 0;      // of shared memory's 32 banks
};

void count_global(Counter& counter, u32 lanes, const u64* addresses, int size);
void count_shared(Counter& counter, u32 lanes, const u64* addresses, int size);

}  // namespace ptx
