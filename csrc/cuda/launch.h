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
// The architecture that the code of a kernel was compiled for, 10 * major + minor: less than the device's where the
// driver compiled PTX of an older one. What the code leaves out for that architecture, it lacks on this device too.
int code_architecture(Kernel kernel);
// Blocks that one multiprocessor holds at once; 0 where the kernel does not fit.
int resident_blocks(Kernel kernel, int threads, int shared_bytes);
// Clusters that the device holds at once; 0 where it has none of this size.
int resident_clusters(Kernel kernel, const Launch& launch);
// On `stream`, without waiting. Throws std::runtime_error with the driver's words, and std::invalid_argument where
// blocks that wait for one another are more than the device has room for now.
void run(Kernel kernel, const Launch& launch, const Problem& problem, void* stream);

}  // namespace kdops::cuda
