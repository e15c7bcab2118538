// mbarrier objects: phases of arrivals and of bytes that copies bring.
#include "lanes.h"

namespace ptx {
namespace {

constexpr u32 kMostArrivals = (1u << 20) - 1;
constexpr i64 kMostBytes = (1 << 20) - 1;
constexpr u32 kObjectBytes = 8;

void mark(Block& block, u32 offset, bool object) {
  block.shadow.each(offset, kObjectBytes, [&](Cell& c, size_t, int) {
    c.flags = object ? c.flags | kBarrierObject | kWritten : c.flags & ~kBarrierObject;
  });
}
u64 state_of(const MBarrier& b) { return static_cast<u64>(b.pending) << 32 | b.phase; }
bool on_remote(const Instruction& n, const Warp& w, const Machine::Place& p) {
  return n.has(kClusterWindow) && p.block != w.block;
}

}  // namespace

// The object at an address, whose initialisation the thread must know of.
MBarrier* Machine::mbarrier(Warp& w, int lane, const Instruction& n, u64 address, Space space, Place& p) {
  if (!locate(w, lane, n, space, address, p) || !within(w, lane, n, p, kObjectBytes, "access")) return nullptr;
  const auto found = p.space == Space::Shared ? p.block->mbarriers.find(u32(p.address)) : p.block->mbarriers.end();
  if (p.space != Space::Shared || found == p.block->mbarriers.end()) {
    report("no mbarrier there", n.pc, where(w, lane));
    return nullptr;
  }
  MBarrier& b = found->second;
  const bool own = b.initialised.slot == w.slot;
  const bool by_other_lane = own && lane != b.lane && w.lane_order <= b.initialised.clock;
  if (by_other_lane || w.knows.seen.get(b.initialised.slot) < b.initialised.clock)
    report("race: mbarrier used before its initialisation is known", n.pc, where(w, lane), int(b.initialised.pc));
  if (n.name == "cp" && n.says("bulk") && w.knows.to_async_shared.get(b.initialised.slot) < b.initialised.clock)
    report("mbarrier not fenced for asynchronous copies", n.pc, where(w, lane), int(b.initialised.pc));
  return &b;
}

void Machine::end_phase_if_complete(MBarrier& b) {
  if (b.pending || b.bytes) return;
  b.done = b.gathering;
  b.gathering = nothing_known();
  ++b.phase;
  b.done.seen.set(b.slot, b.phase);
  b.pending = b.expected;
  make_progress();
}

// What was under way has landed: bytes are counted, or an arrival.
void Machine::complete(const Completion& c) {
  const auto found = c.block->mbarriers.find(c.barrier);
  if (found == c.block->mbarriers.end()) {
    report("asynchronous copy completes on no mbarrier", c.instruction->pc, "");
    return;
  }
  MBarrier& b = found->second;
  for (const auto& copy : c.copies) land(*copy, {b.slot, b.phase + 1, 0}, 0);
  b.bytes -= c.bytes;
  if (c.arrives) {
    if (!b.pending) report("more arrivals than the mbarrier expects", c.instruction->pc, "");
    else --b.pending;
  }
  end_phase_if_complete(b);
}

namespace {

void initialise(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  each(lanes, [&](int l) {
    Machine::Place p;
    const u64 address = m.source(w, n.at[0].base)[l] + n.at[0].offset;
    if (!m.locate(w, l, n, n.space, address, p) || !m.within(w, l, n, p, kObjectBytes, "access")) return;
    const u32 count = u32(m.source(w, n.from[0])[l]), offset = u32(p.address);
    if (!count || count > kMostArrivals) m.report("count of an mbarrier", n.pc, m.where(w, l));
    if (p.block->mbarriers.count(offset)) m.report("mbarrier initialised twice", n.pc, m.where(w, l));
    Machine::Access a{&w, l, n.pc, true, false, false, "shared", offset - kSharedBase};
    if (m.launch.races) p.block->shadow.each(offset, kObjectBytes, [&](Cell& c, size_t, int) { m.touch(c, a, false); });
    MBarrier b;
    b.expected = b.pending = count;
    b.slot = m.next_slot++;
    b.initialised = {w.slot, w.knows.seen.get(w.slot), u32(n.pc)};
    b.lane = l;
    b.gathering = m.nothing_known();
    p.block->mbarriers[offset] = b;
    mark(*p.block, offset, true);
  });
}
void invalidate(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  each(lanes, [&](int l) {
    Machine::Place p;
    if (!m.mbarrier(w, l, n, m.source(w, n.at[0].base)[l] + n.at[0].offset, n.space, p)) return;
    mark(*p.block, u32(p.address), false);
    p.block->mbarriers.erase(u32(p.address));
  });
}

void expect_bytes(Machine& m, Warp& w, int lane, const Instruction& n, MBarrier& b, i64 bytes) {
  b.bytes += bytes;
  if (b.bytes > kMostBytes || b.bytes < -kMostBytes) m.report("bytes of an mbarrier out of range", n.pc, m.where(w, lane));
}
void run_expect(Machine& m, Warp& w, const Instruction& n, u32 lanes) {  // and complete_tx
  const bool expects = n.says("expect_tx");
  each(lanes, [&](int l) {
    Machine::Place p;
    MBarrier* b = m.mbarrier(w, l, n, m.source(w, n.at[0].base)[l] + n.at[0].offset, n.space, p);
    if (!b) return;
    const i64 bytes = u32(m.source(w, n.from[0])[l]);
    expect_bytes(m, w, l, n, *b, expects ? bytes : -bytes);
    if (!expects) m.end_phase_if_complete(*b);
  });
}

// An arrival releases what the thread knows, unless it is relaxed or its scope ends before the mbarrier's block.
void arrive(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const bool bytes = n.says("expect_tx"), drops = n.says("arrive_drop");
  each(lanes, [&](int l) {
    Machine::Place p;
    MBarrier* b = m.mbarrier(w, l, n, m.source(w, n.at[0].base)[l] + n.at[0].offset, n.space, p);
    if (!b) return;
    const u32 count = !bytes && !n.from.empty() ? u32(m.source(w, n.from[0])[l]) : 1;
    if (bytes) expect_bytes(m, w, l, n, *b, u32(m.source(w, n.from[0])[l]));
    if (!n.to.empty()) m.target(w, n.to[0])[l] = state_of(*b);
    if (!n.has(kRelaxed) && (!on_remote(n, w, p) || n.says("cluster"))) b->gathering.join(w.knows);
    if (count > b->pending) return m.report("more arrivals than the mbarrier expects", n.pc, m.where(w, l));
    if (n.says("noComplete") && count == b->pending) m.report("noComplete completes a phase", n.pc, m.where(w, l));
    b->pending -= count;
    if (drops) b->expected -= count;
    m.make_progress();
    m.end_phase_if_complete(*b);
  });
  m.advance(w);
}

// Whether a phase has ended: that of a state, or of a parity.
void wait(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bool all = true;
  each(lanes, [&](int l) {
    Machine::Place p;
    MBarrier* b = m.mbarrier(w, l, n, m.source(w, n.at[0].base)[l] + n.at[0].offset, n.space, p);
    const u64 x = m.source(w, n.from[0])[l];
    if (b && !n.says("parity") && u32(x) != b->phase && u32(x) + 1 != b->phase)
      m.report("state of an mbarrier's phase long past", n.pc, m.where(w, l));
    const bool ended = b && (n.says("parity") ? (b->phase & 1) != (x & 1) : b->phase != u32(x));
    m.target(w, n.to[0])[l] = ended;
    all &= ended;
    if (ended && !n.has(kRelaxed)) w.knows.join(b->done);
  });
  if (all) m.order_lanes(w);
  else w.polls = true;
}
void pending_count(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64* state = m.source(w, n.from[0]);
  each(lanes, [&](int l) { m.target(w, n.to[0])[l] = state[l] >> 32; });
}

}  // namespace

Handler mbarrier_handler(const Instruction& n) {
  if (n.name != "mbarrier") return nullptr;
  if (n.says("init")) return initialise;
  if (n.says("inval")) return invalidate;
  if (n.says("arrive") || n.says("arrive_drop")) return arrive;
  if (n.says("expect_tx") || n.says("complete_tx")) return run_expect;
  if (n.says("test_wait") || n.says("try_wait")) return wait;
  if (n.says("pending_count")) return pending_count;
  throw Unsupported("form of mbarrier");
}

}  // namespace ptx
