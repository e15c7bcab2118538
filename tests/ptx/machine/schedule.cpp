// Which warp goes on, which of its lanes, and what they execute. Without a seed the first that can, until it must wait;
// with one in random order, and lanes that have diverged in random order too.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "machine.h"

namespace ptx {
namespace {

constexpr int kIdleRounds = 1000;  // of polling in which nothing changes
constexpr u64 kUndefined = 0xdeadbeefdeadbeefull;

}  // namespace

Machine::Machine(Module& m, Entry& e, const PtxLaunch& l) : module(m), entry(e), launch(l), random(l.seed) {
  allocations.assign(l.allocations, l.allocations + l.allocation_count);
  for (const auto& [begin, end] : m.storage_ranges) allocations.push_back({begin, end});
  std::sort(allocations.begin(), allocations.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  global_shadow.resize(allocations.size());
  counters.resize(e.code.size());
  threads = l.block[0] * l.block[1] * l.block[2];
  warps_per_block = (threads + kLanes - 1) / kLanes;
}

void Machine::report(const std::string& kind, int pc, const std::string& what, int other_pc) {
  const auto [found, fresh] = known.emplace(std::make_pair(pc, kind), findings.size());
  if (fresh) findings.push_back({kind, what, pc, other_pc, 1});
  else ++findings[found->second].count;
}

std::string Machine::where(const Warp& w, int lane) const {
  const i32* b = w.block->index;
  return "block (" + std::to_string(b[0]) + "," + std::to_string(b[1]) + "," + std::to_string(b[2]) + ") thread " +
         std::to_string(w.index * kLanes + lane);
}

// ---- the grid -------------------------------------------------------------------------------------------------------
void Machine::run() {
  if (entry.most_threads && (entry.exact_threads ? threads != entry.most_threads : threads > entry.most_threads))
    return report("number of threads against the entry's bound", 0, std::to_string(threads));
  const i64 blocks = i64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  const int together = launch.cooperative ? static_cast<int>(blocks) : std::max(1, launch.cluster);
  if (blocks % std::max(1, launch.cluster)) return report("grid of parts of clusters", 0, std::to_string(blocks));
  std::vector<i64> order(blocks / together);
  std::iota(order.begin(), order.end(), i64(0));
  if (launch.seed) std::shuffle(order.begin(), order.end(), random);
  for (const i64 i : order)
    if (!stop) run_domain(i * together, together);
}

std::unique_ptr<Block> Machine::new_block(Domain& d, i64 linear) {
  auto block = std::make_unique<Block>();
  block->domain = &d;
  block->index[0] = i32(linear % launch.grid[0]);
  block->index[1] = i32(linear / launch.grid[0] % launch.grid[1]);
  block->index[2] = i32(linear / launch.grid[0] / launch.grid[1]);
  const size_t bytes = kSharedBase + (entry.shared_bytes + 15) / 16 * 16 + launch.shared_bytes;
  block->shared.assign(bytes, 0xff);
  block->shadow = Shadow(bytes);
  block->local.assign(size_t(entry.local_bytes) * warps_per_block * kLanes, 0xff);
  block->live = threads;
  for (int i = 0; i < warps_per_block; ++i) {
    auto w = std::make_unique<Warp>();
    w->block = block.get(), w->index = i, w->slot = next_slot++;
    w->registers.assign(size_t(entry.registers) * kLanes, kUndefined);
    const int lanes = std::min(kLanes, threads - i * kLanes);
    w->alive = lanes == kLanes ? kWholeWarp : (1u << lanes) - 1;
    d.warps.push_back(w.get());
    block->warps.push_back(std::move(w));
  }
  return block;
}

void Machine::run_domain(i64 first, int count) {
  Domain d;
  domain = &d;
  d.cluster = std::max(1, launch.cluster);
  d.first_slot = next_slot;
  for (int i = 0; i < count; ++i) {
    d.blocks.push_back(new_block(d, first + i));
    d.blocks.back()->rank = i;
  }
  d.barriers.assign(count / d.cluster, {});
  for (auto& barrier : d.barriers) barrier.gathering = barrier.done = nothing_known();
  for (Warp* w : d.warps) {
    w->knows = w->fenced = w->acquired = nothing_known();
    advance(*w);
    set_specials(*w);
  }
  idle_rounds_ = 0;
  while (!stop) {
    if (launch.seed && random() % 8 == 0) land_one();
    Warp* w = choose();
    if (!w) break;
    run_warp(*w, launch.quantum > 0 ? 1 + i64(random() % u64(launch.quantum)) : INT64_MAX / 2);
  }
  finish_stores();
  domain = nullptr;
}

// Those who poll go on once nobody else can, and copies land as late as that.
Warp* Machine::choose() {
  for (;;) {
    std::vector<Warp*> ready, busy;
    bool done = true;
    for (Warp* w : domain->warps) {
      done &= w->alive == 0;
      // A warp whose lanes wait only for one another is run to be reported.
      if (!w->free() && (w->waiting || !w->alive)) continue;
      ready.push_back(w);
      if (!w->polls) busy.push_back(w);
    }
    if (done) return nullptr;
    if (ready.empty()) return report_deadlock("deadlock"), nullptr;
    if (!busy.empty()) return launch.seed ? busy[random() % busy.size()] : busy[0];
    for (Warp* w : ready) w->polls = false;
    if (land_one()) continue;
    idle_rounds_ = progress == idle_progress_ ? idle_rounds_ + 1 : 0;
    idle_progress_ = progress;
    if (idle_rounds_ > kIdleRounds) return report_deadlock("endless polling"), nullptr;
  }
}

void Machine::report_deadlock(const char* kind) {
  stop = true;
  std::string what;
  int pc = 0;
  for (const Warp* w : domain->warps) {
    if (!w->alive) continue;
    pc = static_cast<int>(w->pc[std::countr_zero(w->alive)]);
    const int line = entry.code[pc].line;
    if (what.size() < 400) what += where(*w, std::countr_zero(w->alive)) + " at line " + std::to_string(line) + "; ";
  }
  report(kind, pc, what);
}

// ---- a warp ---------------------------------------------------------------------------------------------------------
void Machine::poll(Warp& w, int pc) {
  if (w.poll_pc == pc && w.poll_progress == progress) w.polls = true;
  w.poll_pc = pc;
  w.poll_progress = progress;
}

// The lanes that go on together: those at the lowest instruction, so that branches meet again. A warp that polls lets
// its other lanes go first; with a seed any may.
u32 Machine::choose_lanes(Warp& w, u32 free) {
  std::vector<u32> places;
  each(free, [&](int l) { places.push_back(w.pc[l]); });
  std::sort(places.begin(), places.end());
  u32 pc = places[0];
  if (w.poll_pc >= 0) pc = places.back(), w.poll_pc = -1;
  if (launch.seed) pc = places[random() % places.size()];
  u32 lanes = 0;
  each(w.alive & ~w.waiting, [&](int l) { lanes |= u32(w.pc[l] == pc) << l; });
  return lanes;
}

void Machine::run_warp(Warp& w, i64 budget) {
  while (!stop && !w.polls && budget > 0 && w.alive) {
    const u32 free = w.free();
    if (!free) {
      if (w.waiting) return;
      const int l = std::countr_zero(w.blocked);
      report("deadlock: lanes of a warp wait for others of it", static_cast<int>(w.pc[l]), where(w, l));
      stop = true;
      return;
    }
    const u32 lanes = choose_lanes(w, free);
    w.blocked &= ~lanes;
    run_group(w, lanes, budget);
  }
}

// Lanes at one instruction, until they part, meet others, wait, or have had their turn.
void Machine::run_group(Warp& w, u32 lanes, i64& budget) {
  const int leader = std::countr_zero(lanes);
  for (bool first = true;; first = false) {
    const u32 pc = w.pc[leader];
    bool others = false;  // to be met here, or further behind
    each(w.alive & ~w.waiting & ~lanes, [&](int l) {
      others |= w.pc[l] == pc || (!launch.seed && !(w.blocked >> l & 1) && w.pc[l] < pc);
    });
    if (others && !first) return;
    if (budget-- <= 0) return;
    if (++steps > launch.most_steps) {
      report("endless loop: the limit of instructions is reached", static_cast<int>(pc), where(w, leader));
      stop = true;
      return;
    }
    const Instruction& n = entry.code[pc];
    u32 active = lanes;
    if (n.predicate != kNothing) {
      const u64* p = source(w, n.predicate);
      active = 0;
      each(lanes, [&](int l) { active |= u32((p[l] & 1) != u64(n.predicate_negated)) << l; });
    }
    counters[pc].executed += active != 0;
    if (!step(w, n, lanes, active)) return;
  }
}

// Executes an instruction and moves the lanes on; false where they no longer stay together.
bool Machine::step(Warp& w, const Instruction& n, u32& lanes, u32 active) {
  const auto advance_all = [&](u32 which) { each(which, [&](int l) { ++w.pc[l]; }); };
  if (n.kind == Kind::Branch) {
    branch(w, n, lanes, active);
    return active == lanes || !active;
  }
  if (!active) return advance_all(lanes), true;
  if (n.kind == Kind::Exit) {
    advance_all(lanes & ~active);
    exit_lanes(w, active, n);
    return false;
  }
  if (!n.unsupported.empty()) {
    report("unsupported: " + n.unsupported, n.pc, where(w, std::countr_zero(active)));
    stop = true;
    return false;
  }
  if (n.together && !assemble(w, n, lanes, active)) return false;
  switch (n.kind) {
    case Kind::BlockBarrier:
      advance_all(lanes & ~active);
      if (n.says("arrive")) advance_all(active);
      block_barrier(w, n, active);
      return active == lanes && !(w.waiting & lanes);
    case Kind::ClusterArrive: cluster_arrive(w, n, active); break;
    case Kind::ClusterWait:
      if (!cluster_wait(w, n, active)) return advance_all(lanes & ~active), false;
      break;
    case Kind::Sleep: w.polls = true; break;
    default: n.run(*this, w, n, active);
  }
  advance_all(lanes);
  return !stop && !w.polls;
}

void Machine::branch(Warp& w, const Instruction& n, u32 lanes, u32 active) {
  each(active, [&](int l) { w.pc[l] = static_cast<u32>(n.target); });
  each(lanes & ~active, [&](int l) { ++w.pc[l]; });
  if (n.has(kUniform) && active && active != lanes) report("bra.uni diverges", n.pc, where(w, std::countr_zero(lanes)));
}

// Whether all members of an instruction are there; those that are wait for the others.
bool Machine::assemble(Warp& w, const Instruction& n, u32 lanes, u32 active) {
  const u32 missing = members(w, n, active) & ~active;
  if (!missing) return true;
  each(lanes & ~active, [&](int l) { ++w.pc[l]; });
  // Who has been told not to take part will not come.
  if (missing & lanes) report("members of an instruction are predicated off", n.pc, where(w, std::countr_zero(missing)));
  w.blocked |= active;
  return false;
}

u32 Machine::members(Warp& w, const Instruction& n, u32 lanes) {
  if (!n.member_mask) return w.alive;
  const u64* masks = source(w, n.from.back());
  const int lane = std::countr_zero(lanes);
  const u32 mask = u32(masks[lane]);
  each(lanes, [&](int l) {
    if (!(mask >> l & 1)) report("lane is not in its own member mask", n.pc, where(w, l));
    if (u32(masks[l]) != mask) report("member masks differ", n.pc, where(w, l));
  });
  const int there = std::min(kLanes, threads - w.index * kLanes);
  const u32 started = there == kLanes ? kWholeWarp : (1u << there) - 1;
  if (mask & started & ~w.alive) report("member mask names a lane that has exited", n.pc, where(w, lane));
  return mask & w.alive;
}

void Machine::exit_lanes(Warp& w, u32 lanes, const Instruction& n) {
  check_exit(w, lanes, n);
  w.alive &= ~lanes;
  Block& block = *w.block;
  block.live -= std::popcount(lanes);
  make_progress();
  if (!block.live)
    for (const auto& c : domain->in_flight) {
      bool touched = c.block == &block;
      for (const auto& copy : c.copies) touched |= copy->to_block == &block || (copy->from_block == &block && !copy->read);
      if (touched) report("exit with copies under way", n.pc, where(w, std::countr_zero(lanes)));
    }
  if (block.live)
    for (auto& [id, barrier] : block.barriers)
      if (!barrier.expected) complete_if_all_arrived(block, id);
  ClusterBarrier& c = domain->barriers[block.rank / domain->cluster];
  if (!w.alive && w.cluster_arrived && w.cluster_phase == c.phase) --c.arrived;  // counted among those who live
  if (c.arrived) complete_cluster_if_all_arrived(block);
}

}  // namespace ptx
