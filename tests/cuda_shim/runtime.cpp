// A simulated CUDA runtime for csrc/cuda/launch.cu: it answers queries, records what is set, and launches nothing.
#include <cuda_runtime_api.h>

#include <atomic>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "cuda/launch.h"

namespace {

struct Runtime {
  int ptx = 90, binary = 90;
  cudaError_t launched = cudaSuccess;
  std::atomic<int> shared_set{0}, clusters_set{0}, least_shared{1 << 30}, launches{0};
} runtime;

constexpr int kSharedOptIn = 227 << 10;

void kernel(kdops::cuda::Problem) {}

}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "simulated error"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedOptIn; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = kSharedOptIn + 1024; break;
    default: *value = 50 << 20;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = runtime.ptx, attributes->binaryVersion = runtime.binary;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute name, int value) {
  if (name == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    ++runtime.clusters_set;
    return runtime.ptx < 90 ? cudaErrorInvalidValue : cudaSuccess;
  }
  ++runtime.shared_set;
  if (value < runtime.least_shared) runtime.least_shared = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 3, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  return *clusters = 16, cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  ++runtime.launches;
  return runtime.launched;
}

#define RUNTIME_EXPORT __attribute__((visibility("default")))
RUNTIME_EXPORT void runtime_code(int ptx, int binary) { runtime.ptx = ptx, runtime.binary = binary; }
RUNTIME_EXPORT void runtime_launches_give(int error) { runtime.launched = static_cast<cudaError_t>(error); }
RUNTIME_EXPORT int runtime_shared_set() { return runtime.shared_set; }
RUNTIME_EXPORT int runtime_least_shared() { return runtime.least_shared; }
RUNTIME_EXPORT int runtime_clusters_set() { return runtime.clusters_set; }
RUNTIME_EXPORT int runtime_launches() { return runtime.launches; }
RUNTIME_EXPORT int runtime_code_architecture() { return kdops::cuda::code_architecture(kernel); }

// The kind and the message of what a launch threw, or an empty string.
RUNTIME_EXPORT const char* runtime_run(int shared_bytes, int cluster, int cooperative) {
  static thread_local std::string text;
  try {
    kdops::cuda::run(kernel, {256, 256, shared_bytes, cluster, cooperative != 0}, {}, nullptr);
    text = "";
  } catch (const std::invalid_argument& refused) {
    text = std::string("refused: ") + refused.what();
  } catch (const std::exception& error) {
    text = std::string("error: ") + error.what();
  }
  return text.c_str();
}

// Many host threads launch the kernel with different amounts of shared memory; how many launches failed.
RUNTIME_EXPORT int runtime_run_from_threads(int threads, int times) {
  std::atomic<int> failed{0};
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t)
    all.emplace_back([&, t] {
      for (int i = 0; i < times; ++i) failed += *runtime_run((50 + t + i) << 10, 1, 0) != 0;
    });
  for (auto& thread : all) thread.join();
  return failed;
}
}
