// Asynchronous copies: issued, read and landed as late as their completion allows; and cp.async with its groups.
#include <algorithm>
#include <cstring>

#include "atomics.h"
#include "lanes.h"

namespace ptx {
namespace {

Machine::Place end_of(Block* block, u64 address) {
  return {block ? Space::Shared : Space::Global, address, block};
}
size_t shadow_offset(Machine& m, const Machine::Place& p) {
  return p.space == Space::Shared ? p.address : p.address - m.allocation_of(p.address, 1)->begin;
}
const char* space_name(Block* block) { return block ? "shared" : "global"; }

}  // namespace

// Checks both ends and marks them; false where the copy cannot take place.
bool Machine::issue(Copy& c) {
  Warp& w = *c.warp;
  const Instruction& n = *c.instruction;
  const Place to = end_of(c.to_block, c.to), from = end_of(c.from_block, c.from);
  const int unit = c.async_proxy ? 16 : static_cast<int>(c.size);
  if (c.async_proxy && c.size % 16) report("size of a bulk copy is not a multiple of 16", n.pc, where(w, c.lane));
  if (c.to % unit || c.from % unit) report("misaligned asynchronous copy", n.pc, where(w, c.lane));
  if (!within(w, c.lane, n, to, static_cast<int>(c.size), "write", 1)) return false;
  if (c.source_bytes && !c.immediate) {
    if (!within(w, c.lane, n, from, static_cast<int>(c.source_bytes), "read", 1)) return false;
    Access a{&w, c.lane, n.pc, false, c.async_proxy, false, space_name(c.from_block), c.from};
    if (Shadow* shadow = shadow_of(from))
      shadow->each(shadow_offset(*this, from), c.source_bytes, [&](Cell& cell, size_t, int) {
        if (c.from_block && !(cell.flags & (kWritten | kCopyTarget)))
          report("uninitialised shared read", n.pc, where(w, c.lane));
        if (launch.races) touch(cell, a, false);
        if (c.from_block) ++cell.copies_from;
      });
  }
  if (!c.reduction.empty()) return true;  // reductions may meet
  Access a{&w, c.lane, n.pc, true, c.async_proxy, false, space_name(c.to_block), c.to};
  if (Shadow* shadow = shadow_of(to))
    shadow->each(shadow_offset(*this, to), c.size, [&](Cell& cell, size_t, int) {
      if (launch.races) touch(cell, a, false);
      cell.flags |= kCopyTarget;
    });
  if (c.to_block) std::memset(c.to_block->shared.data() + c.to, 0xff, c.size);  // not there yet
  return true;
}

void Machine::read_source(Copy& c) {
  if (c.read) return;
  c.read = true;
  if (c.immediate) return;
  c.data.assign(c.size, 0);
  if (!c.source_bytes) return;
  const u8* from = c.from_block ? c.from_block->shared.data() + c.from : reinterpret_cast<const u8*>(c.from);
  std::memcpy(c.data.data(), from, c.source_bytes);
  if (c.from_block)
    c.from_block->shadow.each(c.from, c.source_bytes, [](Cell& cell, size_t, int) { --cell.copies_from; });
}

void Machine::land(Copy& c, const Event& writer, int writer_lane) {
  if (c.landed) return;
  read_source(c);
  c.landed = true;
  const Place p = end_of(c.to_block, c.to);
  if (c.to_block && !c.to_block->live)
    report("asynchronous copy into a block that has exited", c.instruction->pc, where(*c.warp, c.lane));
  u8* to = c.to_block ? c.to_block->shared.data() + c.to : reinterpret_cast<u8*>(c.to);
  const u32 element = c.reduction.empty() ? c.size : static_cast<u32>(bytes_of(c.type));
  for (u32 i = 0; i < c.size && !c.reduction.empty(); i += element) {
    u64 old = 0, x = 0;
    std::memcpy(&old, to + i, element), std::memcpy(&x, c.data.data() + i, element);
    const u64 y = atomic_result(c.reduction, c.type, old, x);
    std::memcpy(c.data.data() + i, &y, element);
  }
  std::memcpy(to, c.data.data(), c.size);
  if (Shadow* shadow = shadow_of(p))
    shadow->each(shadow_offset(*this, p), c.size, [&](Cell& cell, size_t, int) {
      const u8 strong = c.reduction.empty() ? 0 : kStrongWrite;
      cell.flags = static_cast<u8>(kWritten | kByAsync | strong | (cell.flags & kBarrierObject));
      cell.write = writer;
      cell.write.pc = static_cast<u32>(c.instruction->pc);
      cell.write_lane = static_cast<u8>(writer_lane);
      cell.readers = -1;
    });
  make_progress();
}

// The thread that issued the copy has waited for it, and knows of it alone.
void Machine::land_for_thread(Copy& c) {
  const Warp& w = *c.warp;
  land(c, {w.slot, w.knows.seen.get(w.slot), 0}, c.lane);
}

std::vector<CopyPointer> CopyGroups::under_way() const {
  std::vector<CopyPointer> all;
  for (const auto& group : closed) all.insert(all.end(), group.begin(), group.end());
  all.insert(all.end(), open.begin(), open.end());
  all.erase(std::remove_if(all.begin(), all.end(), [](const CopyPointer& c) { return c->landed; }), all.end());
  return all;
}

// Lands something that completes on an mbarrier: the first that was issued, or with a seed any.
bool Machine::land_one() {
  auto& flight = domain->in_flight;
  if (flight.empty()) return false;
  const size_t i = launch.seed ? random() % flight.size() : 0;
  const Completion chosen = flight[i];
  flight.erase(flight.begin() + static_cast<long>(i));
  complete(chosen);
  return true;
}

void Machine::check_exit(Warp& w, u32 lanes, const Instruction& n) {
  each(lanes, [&](int l) {
    bool unfinished = !w.copies[l].under_way().empty();
    for (const auto& c : w.bulk[l].under_way()) unfinished |= !c->read;
    if (unfinished) report("exit with copies under way", n.pc, where(w, l));
  });
}

// At the end of its blocks: bulk stores whose source has been read.
void Machine::finish_stores() {
  for (const auto& c : domain->stores)
    if (c->read) land_for_thread(*c);
}

// ---- cp.async -------------------------------------------------------------------------------------------------------
namespace {

void commit(Machine&, Warp& w, const Instruction&, u32 lanes) {
  each(lanes, [&](int l) {
    w.copies[l].closed.push_back(std::move(w.copies[l].open));
    w.copies[l].open.clear();
  });
}
void wait(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  each(lanes, [&](int l) {
    CopyGroups& groups = w.copies[l];
    const u64 keep = n.says("wait_all") ? 0 : m.source(w, n.from[0])[l];
    if (n.says("wait_all")) groups.closed.push_back(std::move(groups.open)), groups.open.clear();
    for (; groups.closed.size() > keep; groups.closed.pop_front())
      for (const auto& c : groups.closed.front()) m.land_for_thread(*c);
  });
}
// The mbarrier counts an arrival once all copies of the thread so far have landed.
void arrive_when_landed(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  each(lanes, [&](int l) {
    Machine::Place p;
    MBarrier* barrier = m.mbarrier(w, l, n, m.source(w, n.at[0].base)[l] + n.at[0].offset, n.space, p);
    if (!barrier) return;
    if (!n.says("noinc")) ++barrier->pending;
    Completion done{w.copies[l].under_way(), p.block, u32(p.address), 0, true, &n};
    barrier->gathering.join(w.knows);
    m.domain->in_flight.push_back(std::move(done));
  });
  m.advance(w);
}
void copy(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64 *to = m.source(w, n.at[0].base), *from = m.source(w, n.at[1].base);
  const u64* source_bytes = m.source(w, n.from.size() > 1 ? n.from[1] : n.from[0]);
  const u64* size = m.source(w, n.from[0]);
  u64 addresses[kLanes];
  each(lanes, [&](int l) {
    Machine::Place target, source;
    addresses[l] = from[l] + n.at[1].offset;
    if (!m.locate(w, l, n, Space::Shared, to[l] + n.at[0].offset, target)) return;
    if (!m.locate(w, l, n, Space::Generic, addresses[l], source)) return;
    auto c = std::make_shared<Copy>();
    c->to_block = target.block, c->to = target.address, c->from = source.address;
    c->size = u32(size[l]), c->source_bytes = std::min(u32(source_bytes[l]), c->size);
    c->warp = &w, c->lane = l, c->instruction = &n;
    if (m.issue(*c)) w.copies[l].open.push_back(c);
  });
  if (m.launch.count) count_global(m.counters[n.pc], lanes, addresses, static_cast<int>(size[0]));
}

}  // namespace

Handler copy_handler(const Instruction& n) {
  if (n.name != "cp" || !n.says("async")) return nullptr;
  if (n.says("commit_group")) return commit;
  if (n.says("wait_group") || n.says("wait_all")) return wait;
  if (n.says("arrive") || n.rest.find("mbarrier") != std::string::npos) return arrive_when_landed;
  if (n.at.size() != 2 || n.from.empty()) throw Unsupported("form of cp.async");
  return copy;
}

}  // namespace ptx
