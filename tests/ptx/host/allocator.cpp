// PyTorch's CPU memory while kernels run as PTX: every live allocation is known, lies between red zones, and fresh
// memory holds a pattern that the interpreter recognises.
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

constexpr size_t kRedZone = 256;
constexpr uint16_t kPoison = 0xffa5;  // as in machine/memory.cpp

std::mutex mutex;
std::map<char*, size_t>& live() {
  static auto* const allocations = new std::map<char*, size_t>();  // tensors outlive static destructors
  return *allocations;
}

// While a recording holds memory, what is freed stays: its launches may be repeated.
bool held = false;
std::vector<char*> waiting;

void free_now(char* data) {
  live().erase(data);
  std::free(data - kRedZone);
}
void release(void* data) {
  if (!data) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (held) waiting.push_back(static_cast<char*>(data));
  else free_now(static_cast<char*>(data));
}

struct Tracking final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (!bytes) return {nullptr, nullptr, &release, cpu};
    void* base = nullptr;
    const size_t whole = (bytes + 2 * kRedZone + 1) / 2 * 2;
    if (posix_memalign(&base, kRedZone, whole)) throw std::bad_alloc();
    for (size_t i = 0; i < whole; i += 2) std::memcpy(static_cast<char*>(base) + i, &kPoison, 2);
    char* data = static_cast<char*>(base) + kRedZone;
    const std::lock_guard<std::mutex> lock(mutex);
    live()[data] = bytes;
    return {data, data, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} tracking;

}  // namespace

extern "C" {

void allocator_install() { c10::SetCPUAllocator(&tracking, 100); }

void allocator_hold(int hold) {
  const std::lock_guard<std::mutex> lock(mutex);
  held = hold;
  for (char* data : waiting)
    if (!held) free_now(data);
  if (!held) waiting.clear();
}

// Begin and end of up to `room` live allocations; returns how many there are.
int64_t allocator_list(uint64_t* out, int64_t room) {
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t i = 0;
  for (const auto& [data, bytes] : live()) {
    if (i < room) out[2 * i] = reinterpret_cast<uint64_t>(data), out[2 * i + 1] = out[2 * i] + bytes;
    ++i;
  }
  return i;
}
}
