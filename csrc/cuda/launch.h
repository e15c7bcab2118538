// Launches and device limits, free of PyTorch. The tests' host shim has its own definitions of these functions.
#pragma once

#include "problem.h"

namespace kdops::cuda {

using Kernel = void (*)(Problem);

struct Device {
  int architecture;  // 10 * major + minor
  int multiprocessors;
  int shared_per_block, shared_per_multiprocessor;  // bytes
  int l2_bytes;
};

struct Launch {
  int blocks = 0, threads = 0, shared_bytes = 0;
  int cluster = 1;
  bool cooperative = false;
};

// Of the current device; asked once per device.
const Device& device_limits();
// Blocks that one multiprocessor holds at once; 0 where the kernel does not fit.
int resident_blocks(Kernel kernel, int threads, int shared_bytes);
// Clusters that the device holds at once; 0 where it has none of this size.
int resident_clusters(Kernel kernel, const Launch& launch);
// On `stream`, without waiting. Throws std::runtime_error with the driver's words.
void run(Kernel kernel, const Launch& launch, const Problem& problem, void* stream);

}  // namespace kdops::cuda
