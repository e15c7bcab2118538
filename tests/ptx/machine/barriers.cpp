// Barriers of a block, split barriers of a cluster.
#include <algorithm>

#include "lanes.h"
#include "machine.h"

namespace ptx {
namespace {

// Operands: the barrier, a number of threads, and for .red a predicate.
struct Operands {
  int id = 0, expected = 0;
  int predicate = kNothing;
};
Operands operands_of(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const int lane = std::countr_zero(lanes);
  const bool reduces = n.says("red");
  const size_t numbers = n.from.size() - (reduces ? 1 : 0);
  Operands o;
  if (numbers > 0) o.id = static_cast<int>(m.source(w, n.from[0])[lane]);
  if (numbers > 1) o.expected = static_cast<int>(m.source(w, n.from[1])[lane]);
  if (reduces) o.predicate = n.from.back();
  return o;
}

void gather_predicates(Machine& m, Warp& w, const Instruction& n, u32 lanes, int slot, BlockBarrier& b) {
  each(lanes, [&](int l) {
    const bool p = (m.source(w, slot)[l] & 1) != u64(n.negated.back());
    b.population += p, b.all &= p, b.any |= p;
  });
}

}  // namespace

void Machine::block_barrier(Warp& w, const Instruction& n, u32 lanes) {
  const Operands o = operands_of(*this, w, n, lanes);
  const bool only_arrives = n.says("arrive");
  if (o.id < 0 || o.id > 15) report("number of a barrier", n.pc, where(w, std::countr_zero(lanes)));
  if (o.expected % kLanes) report("threads of a barrier are not whole warps", n.pc, where(w, std::countr_zero(lanes)));
  BlockBarrier& b = w.block->barriers.try_emplace(o.id, nothing_known()).first->second;
  if (b.arrived && b.expected != o.expected)
    report("barrier with differing numbers of threads", n.pc, where(w, std::countr_zero(lanes)));
  b.expected = o.expected;
  // A warp counts as a whole where all its lanes have to come.
  b.arrived += n.together && o.expected ? kLanes : std::popcount(lanes);
  b.gathering.join(w.knows);
  if (o.predicate != kNothing) gather_predicates(*this, w, n, lanes, o.predicate, b);
  if (only_arrives) {
    advance(w);
  } else {
    b.results.push_back({&w, lanes, &n});
    w.waiting |= lanes;
  }
  complete_if_all_arrived(*w.block, o.id);
}

void Machine::complete_if_all_arrived(Block& block, int id) {
  BlockBarrier& b = block.barriers.at(id);
  const int expected = b.expected ? b.expected : block.live;
  if (!b.arrived || b.arrived < expected) return;
  if (b.arrived > expected) report("more arrivals than the barrier expects", b.results.empty() ? 0 : b.results[0].instruction->pc, "barrier " + std::to_string(id));
  for (const auto& [warp, lanes, n] : b.results) {
    if (n->says("red")) {
      const u64 r = n->says("popc") ? b.population : n->says("and") ? b.all : b.any;
      each(lanes, [&, to = n->to[0]](int l) { target(*warp, to)[l] = r; });
    }
    warp->knows.join(b.gathering);
    order_lanes(*warp);
    warp->waiting &= ~lanes;
    each(lanes, [&, w = warp](int l) { ++w->pc[l]; });
  }
  b = BlockBarrier(nothing_known());
  make_progress();
}

void Machine::cluster_arrive(Warp& w, const Instruction& n, u32) {
  ClusterBarrier& c = domain->barriers[w.block->rank / domain->cluster];
  if (w.cluster_arrived) report("cluster arrive twice", n.pc, where(w, 0));
  w.cluster_arrived = true;
  w.cluster_phase = c.phase;
  if (!n.has(kRelaxed)) c.gathering.join(w.knows);
  advance(w);
  ++c.arrived;
  complete_cluster_if_all_arrived(*w.block);
}

// True where the phase has ended; otherwise the lanes wait.
bool Machine::cluster_wait(Warp& w, const Instruction& n, u32 lanes) {
  ClusterBarrier& c = domain->barriers[w.block->rank / domain->cluster];
  if (!w.cluster_arrived) report("cluster wait without arrive", n.pc, where(w, 0));
  if (w.cluster_arrived && c.phase == w.cluster_phase) {
    w.waiting |= lanes;
    return false;
  }
  w.knows.join(c.done);
  order_lanes(w);
  w.cluster_arrived = false;
  return true;
}

void Machine::complete_cluster_if_all_arrived(Block& block) {
  ClusterBarrier& c = domain->barriers[block.rank / domain->cluster];
  const int first = cluster_first(block);
  int live = 0;
  for (int i = first; i < first + domain->cluster; ++i)
    for (const auto& w : domain->blocks[i]->warps) live += w->alive != 0;
  if (!live || c.arrived < live) return;
  ++c.phase;
  c.arrived = 0;
  c.done = c.gathering;
  c.gathering = nothing_known();
  for (int i = first; i < first + domain->cluster; ++i)
    for (auto& w : domain->blocks[i]->warps)
      if (w->waiting && entry.code[w->pc[std::countr_zero(w->waiting)]].kind == Kind::ClusterWait) w->waiting = 0;
  make_progress();
}

}  // namespace ptx
