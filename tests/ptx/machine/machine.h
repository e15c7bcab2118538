// A launch under way: blocks that run together, their warps, their memory, and what has been found.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "capi.h"
#include "clocks.h"
#include "counters.h"
#include "program.h"
#include "shadow.h"

namespace ptx {

struct Block;
struct Domain;

// An asynchronous copy: issued, later its source is read, later it lands.
struct Copy {
  Block* to_block = nullptr;  // null: global memory
  Block* from_block = nullptr;
  u64 to = 0, from = 0;  // an offset in a block, or an address
  u32 size = 0, source_bytes = 0;  // what the source lacks is filled with zeros
  bool immediate = false;    // st.async, red.async: the value is `data`
  bool async_proxy = false;  // a bulk copy
  std::string reduction;        // with what is there, of this type
  Type type = Type::None;
  std::vector<u8> data;
  bool read = false, landed = false;
  Warp* warp = nullptr;
  int lane = 0;
  const Instruction* instruction = nullptr;
};
using CopyPointer = std::shared_ptr<Copy>;

struct MBarrier;
// What completes on an mbarrier: copies that count bytes, or an arrival once the copies have landed.
struct Completion {
  std::vector<CopyPointer> copies;
  Block* block = nullptr;  // of the mbarrier
  u32 barrier = 0;
  u32 bytes = 0;
  bool arrives = false;
  const Instruction* instruction = nullptr;
};

struct MBarrier {
  u32 expected = 0, pending = 0, phase = 0, slot = 0;
  i64 bytes = 0;
  Knowledge gathering, done;
  Event initialised;
  int lane = 0;
};

struct CopyGroups {
  std::vector<CopyPointer> open;
  std::deque<std::vector<CopyPointer>> closed;
  std::vector<CopyPointer> under_way() const;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;  // in the block
  u32 slot = 0;
  std::vector<u64> registers;
  u32 pc[kLanes] = {};
  u32 alive = 0;
  u32 blocked = 0;  // lanes that wait for the other members of an instruction
  u32 waiting = 0;  // lanes at a barrier of the block or cluster
  int barrier[kLanes] = {};  // which, kClusterBarrier for the cluster's
  Knowledge knows, fenced, acquired;
  u32 lane_order = 0;  // what a lane did before this clock, the others know of
  bool has_fence = false;
  bool cluster_arrived = false;
  u32 cluster_phase = 0;
  bool polls = false;  // goes on once nobody else can
  int poll_pc = -1;
  u64 poll_progress = 0;
  CopyGroups copies[kLanes], bulk[kLanes];

  // Lanes that can go on.
  u32 free() const { return alive & ~waiting & ~blocked; }
};
constexpr int kClusterBarrier = -1;

struct BlockBarrier {
  explicit BlockBarrier(const Knowledge& nothing) : gathering(nothing) {}
  int arrived = 0, expected = 0;  // threads
  Knowledge gathering;
  u32 population = 0;  // of predicates, for .red
  bool all = true, any = false;
  struct Result {
    Warp* warp;
    u32 lanes;
    const Instruction* instruction;
  };
  std::vector<Result> results;
};

struct Block {
  Domain* domain = nullptr;
  int rank = 0;  // in the domain
  i32 index[3] = {};
  std::vector<u8> shared, local;
  Shadow shadow;
  std::vector<std::unique_ptr<Warp>> warps;
  int live = 0;  // threads
  std::map<int, BlockBarrier> barriers;
  std::map<u32, MBarrier> mbarriers;
};

struct ClusterBarrier {
  u32 phase = 0;
  int arrived = 0;  // warps
  Knowledge gathering, done;
};

// Blocks that run together: a cluster, or the whole grid of a cooperative launch.
struct Domain {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> warps;
  int cluster = 1;
  u32 first_slot = 0;
  std::vector<ClusterBarrier> barriers;
  std::vector<std::vector<u32>> readers;  // of cells with several: clock + 1 by slot
  std::deque<Completion> in_flight;
  std::vector<CopyPointer> stores;        // bulk stores whose source has been read
};

struct Finding {
  std::string kind, what;
  int pc, other_pc;
  u64 count;
};

struct Machine {
  Machine(Module& module, Entry& entry, const PtxLaunch& launch);
  void run();

  // ---- findings ----
  void report(const std::string& kind, int pc, const std::string& what, int other_pc = -1);
  std::string where(const Warp& w, int lane) const;

  // ---- operands ----
  const u64* source(Warp& w, int i) const {
    return i >= 0 ? &w.registers[size_t(i) * kLanes] : &entry.constants[size_t(~i) * kLanes];
  }
  u64* target(Warp& w, int i) { return i == kSink ? sink : &w.registers[size_t(i) * kLanes]; }

  // ---- memory: memory.cpp ----
  struct Place {
    Space space;
    u64 address;   // global address, offset in `block`, in the lane's local memory or in the parameters
    Block* block;
  };
  bool locate(Warp& w, int lane, const Instruction& n, Space space, u64 address, Place& place);
  bool locate_shared(Warp& w, int lane, const Instruction& n, u32 address, Place& place);
  bool within(Warp& w, int lane, const Instruction& n, const Place& place, int size, const char* verb,
              int unit = 0);
  void load(Warp& w, int lane, const Instruction& n, u64 address, void* to, int size);
  void store(Warp& w, int lane, const Instruction& n, u64 address, const void* from, int size);
  u8* bytes_at(Warp& w, int lane, const Place& place);
  Shadow* shadow_of(const Place& place);
  const PtxAllocation* allocation_of(u64 address, u64 size);
  std::string nearest_allocation(u64 address) const;
  u32 shared_address(const Warp& w, const Block& block, u32 offset) const;
  int cluster_first(const Block& block) const { return block.rank / domain->cluster * domain->cluster; }

  // ---- races: races.cpp ----
  struct Access {
    Warp* warp;
    int lane, pc;
    bool write, async, strong;
    const char* space;
    u64 address;
  };
  void touch(Cell& cell, const Access& access, bool same_value);
  bool ordered(const Event& event, int lane, bool by_async, const Access& access) const;
  void race(const char* kind, const Access& access, const Event& other, int other_lane);
  void remember_reader(Cell& cell, const Access& access);
  void check_readers(Cell& cell, const Access& access);
  // What a warp knows before its blocks start.
  Knowledge nothing_known() const {
    const VectorClock none(domain->first_slot, domain->warps.size());
    return {none, none, none, entry.async_proxy};
  }
  // The lanes of a warp have met, or one has waited for another.
  void order_lanes(Warp& w) {
    advance(w);
    w.lane_order = w.knows.seen.get(w.slot);
  }
  void advance(Warp& w) { w.knows.seen.set(w.slot, w.knows.seen.get(w.slot) + 1); }
  void release(Warp& w, u64 address, bool now);
  void acquire(Warp& w, u64 address, bool now);
  void fence(Warp& w);

  // ---- copies and mbarriers: copies.cpp, mbarrier.cpp ----
  bool issue(Copy& copy);
  void read_source(Copy& copy);
  void land(Copy& copy, const Event& writer, int writer_lane);
  void land_for_thread(Copy& copy);
  bool land_one();
  void complete(const Completion& completion);
  MBarrier* mbarrier(Warp& w, int lane, const Instruction& n, u64 address, Space space, Place& place);
  void end_phase_if_complete(MBarrier& barrier);
  void check_exit(Warp& w, u32 lanes, const Instruction& n);
  void finish_stores();

  // ---- the scheduler: schedule.cpp, barriers.cpp ----
  void run_domain(i64 first, int blocks);
  void run_warp(Warp& w, i64 budget);
  void poll(Warp& w, int pc);
  void make_progress() { ++progress; }
  void block_barrier(Warp& w, const Instruction& n, u32 lanes);
  void complete_if_all_arrived(Block& block, int id);
  void cluster_arrive(Warp& w, const Instruction& n, u32 lanes);
  bool cluster_wait(Warp& w, const Instruction& n, u32 lanes);
  void complete_cluster_if_all_arrived(Block& block);

  Module& module;
  Entry& entry;
  const PtxLaunch& launch;
  std::mt19937_64 random;
  std::vector<PtxAllocation> allocations;
  std::vector<Shadow> global_shadow;
  size_t last_allocation = 0;
  std::vector<Counter> counters;
  std::vector<Finding> findings;
  std::map<std::pair<int, std::string>, size_t> known;
  std::unordered_map<u64, Knowledge> released;  // by address of an atomic or a strong store
  Domain* domain = nullptr;
  int threads = 0, warps_per_block = 0;
  u32 next_slot = 0;
  i64 steps = 0;
  u64 progress = 0, same_values = 0;
  bool stop = false;
  u64 sink[kLanes];

 private:
  std::unique_ptr<Block> new_block(Domain& d, i64 linear);
  void set_specials(Warp& w);
  Warp* choose();
  u32 choose_lanes(Warp& w, u32 free);
  u32 members(Warp& w, const Instruction& n, u32 lanes);
  void run_group(Warp& w, u32 lanes, i64& budget);
  bool step(Warp& w, const Instruction& n, u32& lanes, u32 active);
  bool assemble(Warp& w, const Instruction& n, u32 lanes, u32 active);
  void branch(Warp& w, const Instruction& n, u32 lanes, u32 active);
  void exit_lanes(Warp& w, u32 lanes, const Instruction& n);
  void report_deadlock(const char* kind);
  int idle_rounds_ = 0;
  u64 idle_progress_ = 0;
};

template <class F>
inline void each(u32 lanes, F&& f) {
  if (lanes == kWholeWarp) {
    for (int l = 0; l < kLanes; ++l) f(l);
    return;
  }
  for (; lanes; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

}  // namespace ptx
