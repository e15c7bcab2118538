#include "launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace kdops::cuda {
namespace {

constexpr int kMaxDevices = 64;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("kdops: ") + what + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

Device asked(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  return {10 * major + attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          attribute(cudaDevAttrL2CacheSize, device)};
}

struct Configured {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config;
  Configured(const Launch& launch, void* stream) : config{} {
    config.gridDim = dim3(launch.blocks), config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes, config.numAttrs = 0;
    if (launch.cluster > 1) {
      auto& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim.x = launch.cluster, a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
    }
    if (launch.cooperative) {
      auto& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeCooperative, a.val.cooperative = 1;
    }
  }
};

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Driver queries take microseconds, so their results are cached for each device and kernel. All launches have the same
// number of threads. `ask` must not call this function.
template <class Ask>
int remembered(Kernel kernel, int shared_bytes, int cluster, Ask&& ask) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, int, int>, int> answers;
  const auto question = std::make_tuple(current_device(), kernel, shared_bytes, cluster);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = answers.find(question);
  return known != answers.end() ? known->second : answers[question] = ask();
}

constexpr int kCode = -1, kAllowed = -2;  // queries without a size

// Sets the device's maximum once: a limit that followed the size of each launch would race between host threads.
void allow_all(Kernel kernel) {
  const Device& device = device_limits();
  const bool clusters = device.architecture >= 90 && code_architecture(kernel) >= 90;
  remembered(kernel, kAllowed, 0, [&] {
    const void* function = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block),
          "shared memory");
    if (clusters)
      check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
    return 1;
  });
}

}  // namespace

const Device& device_limits() {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> known;
  const int current = current_device();
  std::call_once(known.at(current), [&] { devices[current] = asked(current); });
  return devices[current];
}

int code_architecture(Kernel kernel) {
  return remembered(kernel, kCode, 0, [&] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
    return std::min(attributes.ptxVersion, attributes.binaryVersion);
  });
}

int resident_blocks(Kernel kernel, int threads, int shared_bytes) {
  if (shared_bytes > device_limits().shared_per_block) return 0;
  allow_all(kernel);
  return remembered(kernel, shared_bytes, 0, [&] {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), "occupancy");
    return blocks;
  });
}

int resident_clusters(Kernel kernel, const Launch& launch) {
  if (device_limits().architecture < 90 || launch.shared_bytes > device_limits().shared_per_block) return 0;
  allow_all(kernel);
  return remembered(kernel, launch.shared_bytes, launch.cluster, [&] {
    Configured configured(launch, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &configured.config) !=
        cudaSuccess) {
      cudaGetLastError();  // a cluster size that this device does not support
      return 0;
    }
    return clusters;
  });
}

void run(Kernel kernel, const Launch& launch, const Problem& problem, void* stream) {
  allow_all(kernel);
  Configured configured(launch, stream);
  const cudaError_t error = cudaLaunchKernelEx(&configured.config, kernel, problem);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();
    throw std::invalid_argument("the device has no room now for " + std::to_string(launch.blocks) +
                                " blocks that wait for one another (a share of it under MPS or a green context?)");
  }
  check(error, "launch");
}

}  // namespace kdops::cuda
