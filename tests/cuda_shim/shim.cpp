// Fibers for the host shim, and the launches and limits of a simulated device.
#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <ucontext.h>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace kdops::cuda {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kEndless = 100000;  // rounds of polling without progress
constexpr unsigned char kPoison = 0xff;  // a NaN in every type

// Runs a launch elsewhere; returns an error message, or null.
using Launcher = const char* (*)(const char* kernel, int blocks, int threads, int shared_bytes, int cluster, int cooperative,
                                 const void* problem, int problem_bytes);

struct Fiber;

struct Barrier {
  int expected = 0;
  std::vector<Fiber*> waiting;
};

// Arriving does not wait; waiting ends once all have arrived.
struct SplitBarrier {
  int expected = 0, arrived = 0;
  unsigned phase = 0;
  std::vector<Fiber*> waiting;
};

struct Copy {
  void* to;
  const void* from;
};

struct Warp {
  Barrier barrier;
  float slots[2][kLanes];
};

struct Block {
  int index, rank, first;  // in the grid, in its cluster, and its cluster's first in `blocks`
  int running;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  int thread = 0, shuffles = 0;
  bool arrived = false;
  unsigned phase = 0;
  std::vector<std::vector<Copy>> copies;
  std::vector<Copy> open_copies;
};

struct Machine {
  Device limits{90, 4, 227 << 10, 228 << 10, 50 << 20};
  int code = 90;  // architecture that the kernels were compiled for
  int busy = 0;   // multiprocessors that others hold
  bool plan_only = false;
  unsigned seed = 0;  // 0: first come, first served; odd: a random order; even: some blocks run far ahead
  int64_t loaded = 0, stored = 0;
  std::string last_launch;
  Launcher launcher = nullptr;  // null: fibers

  std::vector<std::unique_ptr<Fiber>> pool;
  std::vector<Block> blocks;
  std::vector<Fiber*> ready, polling;
  size_t next = 0;
  int idle = 0;
  std::mt19937 random;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  Launch launch;
  Kernel kernel = nullptr;
  const Problem* problem = nullptr;
  std::vector<SplitBarrier> clusters;
  std::string error;
} machine;

[[noreturn]] void to_scheduler() { _longjmp(machine.scheduler, 1); }

void pause() {
  if (_setjmp(machine.current->resume) == 0) to_scheduler();
}

[[noreturn]] void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
  machine.current->done = true;
  to_scheduler();
}

void wake(Fiber* fiber) {
  machine.ready.push_back(fiber);
  machine.idle = 0;
}

void meet(Barrier& barrier) {
  barrier.waiting.push_back(machine.current);
  if (static_cast<int>(barrier.waiting.size()) == barrier.expected) {
    for (Fiber* fiber : barrier.waiting) wake(fiber);
    barrier.waiting.clear();
  }
  pause();
}

void body() {
  machine.kernel(*machine.problem);
  Fiber* self = machine.current;
  self->done = true;
  --self->block->running;
  to_scheduler();
}

// The ready fiber of the block that this seed favours most.
size_t furthest_ahead() {
  size_t best = 0;
  unsigned most = 0;
  for (size_t i = 0; i < machine.ready.size(); ++i) {
    const unsigned favour = (machine.ready[i]->block->index + 1u) * (machine.seed * 2654435761u);
    if (favour >= most) best = i, most = favour;
  }
  return best;
}

Fiber* pick() {
  auto& ready = machine.ready;
  if (machine.seed) {
    const size_t chosen = machine.seed % 2 ? machine.random() % ready.size() : furthest_ahead();
    std::swap(ready[chosen], ready.back());
    Fiber* fiber = ready.back();
    ready.pop_back();
    return fiber;
  }
  Fiber* fiber = ready[machine.next++];
  if (machine.next > 4096 && machine.next * 2 > ready.size()) {
    ready.erase(ready.begin(), ready.begin() + machine.next);
    machine.next = 0;
  }
  return fiber;
}

// Fibers that poll memory continue once no other fiber can.
bool anyone_ready() {
  if (machine.ready.size() > (machine.seed ? 0 : machine.next)) return true;
  machine.ready.swap(machine.polling);
  machine.polling.clear(), machine.next = 0;
  if (++machine.idle > kEndless) machine.error = "threads poll memory for ever";
  return !machine.ready.empty();
}

void drive() {
  while (anyone_ready() && machine.error.empty()) {
    machine.current = pick();
    if (_setjmp(machine.scheduler) == 0) {
      if (machine.current->started) _longjmp(machine.current->resume, 1);
      machine.current->started = true;
      setcontext(&machine.current->start);
    }
  }
}

void prepare_fiber(Fiber& fiber, Block& block, int thread) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, body, 0);
  fiber.started = fiber.done = false;
  fiber.block = &block, fiber.thread = thread, fiber.shuffles = 0, fiber.arrived = false;
  fiber.copies.clear(), fiber.open_copies.clear();
}

// Blocks `from` to `to` are on the device together.
void run_together(int from, int to) {
  const Launch& launch = machine.launch;
  machine.blocks.assign(to - from, {});
  machine.clusters.assign((to - from) / launch.cluster, {});
  for (auto& barrier : machine.clusters) barrier.expected = launch.cluster * launch.threads;
  machine.ready.clear(), machine.polling.clear(), machine.next = 0;
  const size_t fibers = static_cast<size_t>(to - from) * launch.threads;
  while (machine.pool.size() < fibers) machine.pool.push_back(std::make_unique<Fiber>());
  for (int b = 0; b < to - from; ++b) {
    Block& block = machine.blocks[b];
    block.index = from + b, block.rank = b % launch.cluster, block.first = b - block.rank;
    block.running = launch.threads, block.barrier.expected = launch.threads;
    block.warps.resize(launch.threads / kLanes);
    for (auto& warp : block.warps) warp.barrier.expected = kLanes;
    block.shared.assign(launch.shared_bytes + 16, kPoison);
    for (int t = 0; t < launch.threads; ++t) {
      Fiber& fiber = *machine.pool[static_cast<size_t>(b) * launch.threads + t];
      prepare_fiber(fiber, block, t);
      machine.ready.push_back(&fiber);
    }
  }
  drive();
  for (const auto& block : machine.blocks)
    if (machine.error.empty() && block.running) machine.error = "threads wait for one another for ever";
  if (!machine.error.empty()) {
    const std::string error = machine.error;
    machine.error.clear();
    throw std::runtime_error("host shim: " + error);
  }
}

void run_elsewhere(Kernel kernel, const Launch& l, const Problem& problem) {
  Dl_info symbol;
  if (!dladdr(reinterpret_cast<const void*>(kernel), &symbol) || !symbol.dli_sname)
    throw std::runtime_error("host shim: a kernel without a name");
  const char* error = machine.launcher(symbol.dli_sname, l.blocks, l.threads, l.shared_bytes, l.cluster, l.cooperative,
                                       &problem, sizeof(problem));
  if (error) throw std::runtime_error(error);
}

}  // namespace

// ---- functions for the kernels --------------------------------------------------------------------------------------
namespace device {

int thread() { return machine.current->thread; }
int threads() { return machine.launch.threads; }
int block() { return machine.current->block->index; }
int blocks() { return machine.launch.blocks; }

char* shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(machine.current->block->shared.data());
  return reinterpret_cast<char*>((address + 15) / 16 * 16);
}

void sync_block() { meet(machine.current->block->barrier); }

float shuffle_xor(float x, int mask) {
  Fiber* self = machine.current;
  Warp& warp = self->block->warps[self->thread / kLanes];
  float* slots = warp.slots[self->shuffles++ % 2];
  slots[self->thread % kLanes] = x;
  meet(warp.barrier);
  return slots[(self->thread % kLanes) ^ mask];
}

void cluster_arrive() {
  Fiber* self = machine.current;
  SplitBarrier& barrier = machine.clusters[self->block->first / machine.launch.cluster];
  if (self->arrived) fail("a thread arrived twice at a cluster barrier");
  self->arrived = true, self->phase = barrier.phase;
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0, ++barrier.phase;
  for (Fiber* fiber : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
}
void cluster_wait() {
  Fiber* self = machine.current;
  if (!self->arrived) fail("a thread waits for a cluster without having arrived");
  SplitBarrier& barrier = machine.clusters[self->block->first / machine.launch.cluster];
  if (barrier.phase == self->phase) {
    barrier.waiting.push_back(self);
    pause();
  }
  self->arrived = false;
}

const float* of_rank(const float* p, int rank) {
  Block& here = *machine.current->block;
  const ptrdiff_t offset = reinterpret_cast<const char*>(p) - shared_memory();
  if (offset < 0 || offset + 4 > machine.launch.shared_bytes) fail("an address outside the block's shared memory");
  if (rank < 0 || rank >= machine.launch.cluster) fail("no such rank in the cluster");
  Block& there = machine.blocks[here.first + rank];
  if (there.running < machine.launch.threads) fail("shared memory of a block that has ended");
  const auto address = reinterpret_cast<uintptr_t>(there.shared.data());
  return reinterpret_cast<const float*>((address + 15) / 16 * 16 + offset);
}

void arrive(unsigned* counter) { ++*counter; }
void wait_for(const unsigned* counter, unsigned count) {
  while (*counter < count) {
    machine.polling.push_back(machine.current);
    pause();
  }
}

void copy_16_async(void* shared, const void* global) {
  check_alignment(global, 16);
  check_alignment(shared, 16);
  check_shared(shared, 16);
  count_load(16);
  machine.current->open_copies.push_back({shared, global});
}
void close_copy_group() {
  machine.current->copies.push_back(std::move(machine.current->open_copies));
  machine.current->open_copies.clear();
}
void wait_for_copies(int open) {
  auto& groups = machine.current->copies;
  const size_t stay = static_cast<size_t>(open);
  while (groups.size() > stay) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

void check_shared(const void* p, int bytes) {
  const ptrdiff_t offset = static_cast<const char*>(p) - shared_memory();
  if (offset < 0 || offset + bytes > machine.launch.shared_bytes) fail("an access outside the block's shared memory");
  check_alignment(p, bytes);
}
void check_alignment(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a misaligned access of " + std::to_string(bytes) + " bytes");
}
void count_load(int bytes) { machine.loaded += bytes; }
void count_store(int bytes) { machine.stored += bytes; }

}  // namespace device

// ---- functions for the host side ------------------------------------------------------------------------------------
const Device& device_limits() { return machine.limits; }
int code_architecture(Kernel) { return machine.code; }

int resident_blocks(Kernel, int threads, int shared_bytes) {
  const Device& d = machine.limits;
  if (shared_bytes > d.shared_per_block) return 0;
  // Only queried for kernels of whole channels; their registers follow from their launch bounds.
  return std::min({2048 / threads, kChannelBlocks, d.shared_per_multiprocessor / (shared_bytes + 1024)});
}

int resident_clusters(Kernel kernel, const Launch& launch) {
  if (launch.cluster > 16) return 0;
  return machine.limits.multiprocessors * resident_blocks(kernel, launch.threads, launch.shared_bytes) / launch.cluster;
}

void run(Kernel kernel, const Launch& launch, const Problem& problem, void*) {
  if (launch.blocks % launch.cluster) throw std::runtime_error("host shim: the grid is not whole clusters");
  machine.launch = launch, machine.kernel = kernel, machine.problem = &problem;
  machine.random.seed(machine.seed);
  machine.last_launch += std::to_string(launch.blocks) + "," + std::to_string(launch.cluster) + "," +
                         std::to_string(launch.cooperative) + "," + std::to_string(launch.shared_bytes) + ";";
  const int together = launch.cooperative ? launch.blocks : launch.cluster;
  const int each = launch.cooperative ? resident_blocks(kernel, launch.threads, launch.shared_bytes) : 0;
  if (launch.cooperative && launch.blocks > each * machine.limits.multiprocessors)
    throw std::runtime_error("host shim: a cooperative launch of more blocks than the device holds");
  if (launch.cooperative && launch.blocks > each * (machine.limits.multiprocessors - machine.busy))
    throw std::invalid_argument("host shim: no room for a cooperative launch");
  if (machine.plan_only) return;
  if (machine.launcher) return run_elsewhere(kernel, launch, problem);
  for (int b = 0; b < launch.blocks; b += together) run_together(b, b + together);
}

}  // namespace kdops::cuda

extern "C" {
#define KDOPS_SHIM_EXPORT __attribute__((visibility("default")))
KDOPS_SHIM_EXPORT void shim_set_device(int architecture, int multiprocessors, int shared_bytes, int l2_bytes, int code,
                                       int busy) {
  kdops::cuda::machine.limits = {architecture, multiprocessors, shared_bytes, shared_bytes + 1024, l2_bytes};
  kdops::cuda::machine.code = code, kdops::cuda::machine.busy = busy;
}
KDOPS_SHIM_EXPORT void shim_plan_only(int wanted) { kdops::cuda::machine.plan_only = wanted; }
KDOPS_SHIM_EXPORT void shim_set_order(unsigned seed) { kdops::cuda::machine.seed = seed; }
KDOPS_SHIM_EXPORT void shim_reset() {
  kdops::cuda::machine.loaded = kdops::cuda::machine.stored = 0;
  kdops::cuda::machine.last_launch.clear();
}
KDOPS_SHIM_EXPORT int64_t shim_loaded() { return kdops::cuda::machine.loaded; }
KDOPS_SHIM_EXPORT int64_t shim_stored() { return kdops::cuda::machine.stored; }
// blocks,cluster,cooperative,shared_bytes; of each launch since the last reset
KDOPS_SHIM_EXPORT const char* shim_launches() { return kdops::cuda::machine.last_launch.c_str(); }
// Every launch goes to this function; null: to fibers.
KDOPS_SHIM_EXPORT void shim_set_launcher(void* launcher) {
  kdops::cuda::machine.launcher = reinterpret_cast<kdops::cuda::Launcher>(launcher);
}
}
