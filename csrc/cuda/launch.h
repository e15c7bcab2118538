// Launches and device limits, without PyTorch. The tests' host shim defines these functions itself.
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

// Of the current device; queried once per device.
const Device& device_limits();
// The architecture that the code of a kernel was compiled for, 10 * major + minor: less than the device's if the
// driver compiled PTX of an older one. Code that was left out for that architecture is then missing on this device too.
int code_architecture(Kernel kernel);
// Resident blocks of one multiprocessor; 0 if the kernel does not fit.
int resident_blocks(Kernel kernel, int threads, int shared_bytes);
// Resident clusters of the device; 0 if it does not support this size.
int resident_clusters(Kernel kernel, const Launch& launch);
// Asynchronous, on `stream`. Throws std::runtime_error with the driver's message, and std::invalid_argument if a
// cooperative launch has more blocks than the device has room for now.
void run(Kernel kernel, const Launch& launch, const Problem& problem, void* stream);

}  // namespace kdops::cuda
