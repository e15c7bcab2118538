// FastTrack: the last write and the last reads of each cell against the vector clock of the warp that comes. Blocks of
// other domains are ordered only through memory.
#include "machine.h"

namespace ptx {
namespace {

std::string hex(u64 x) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

}  // namespace

void Machine::race(const char* kind, const Access& a, const Event& other, int other_lane) {
  std::string what = where(*a.warp, a.lane) + ", " + a.space + " ";
  what += a.space[0] == 's' ? std::to_string(a.address) : hex(a.address);
  what += "; the other is slot " + std::to_string(other.slot);
  if (other_lane >= 0) what += " lane " + std::to_string(other_lane);
  report(kind, a.pc, what, static_cast<int>(other.pc));
}

bool Machine::ordered(const Event& e, int lane, bool by_async, const Access& a) const {
  const Warp& w = *a.warp;
  if (e.slot == w.slot && !(a.async && !by_async)) return e.clock < w.lane_order || lane == a.lane;
  if (!a.async || by_async) return w.knows.seen.get(e.slot) >= e.clock;
  const auto& fenced = a.space[0] == 's' ? w.knows.to_async_shared : w.knows.to_async_global;
  return fenced.get(e.slot) >= e.clock;
}

// A reader beside others that are not ordered with it.
void Machine::remember_reader(Cell& c, const Access& a) {
  const Event now{a.warp->slot, a.warp->knows.seen.get(a.warp->slot), static_cast<u32>(a.pc)};
  const bool here = (c.flags & kRead) && c.read.slot >= domain->first_slot;
  if ((c.flags & kRead) && !here) {
    c.flags = (c.flags | kForeignRead) & ~kRead;
    c.readers = -1;
  }
  const bool alone = !(c.flags & kRead) || (c.readers < 0 && ordered(c.read, c.read_lane, false, a));
  if (!alone) {
    auto& pool = domain->readers;
    if (c.readers < 0) {
      c.readers = static_cast<i32>(pool.size());
      pool.emplace_back(domain->warps.size(), 0u);
      pool.back()[c.read.slot - domain->first_slot] = c.read.clock + 1;
    }
    pool[c.readers][now.slot - domain->first_slot] = now.clock + 1;
  }
  c.read = now;
  c.read_lane = static_cast<u8>(a.lane);
  c.flags |= kRead;
}

void Machine::check_readers(Cell& c, const Access& a) {
  Access plain = a;  // what was read needs no proxy fence before it is overwritten
  plain.async = false;
  if ((c.flags & (kRead | kForeignRead)) && c.readers < 0) {
    if (!ordered(c.read, c.read_lane, false, plain)) race("race: write after read", a, c.read, c.read_lane);
    return;
  }
  if (c.readers < 0) return;
  const auto& clocks = domain->readers[c.readers];
  const VectorClock& seen = a.warp->knows.seen;
  for (size_t i = 0; i < clocks.size(); ++i) {
    if (!clocks[i]) continue;
    const Event e{domain->first_slot + static_cast<u32>(i), clocks[i] - 1, c.read.pc};
    const bool before = e.slot == a.warp->slot ? e.clock < a.warp->lane_order : seen.get(e.slot) >= e.clock;
    if (!before) return race("race: write after read", a, e, -1);
  }
}

void Machine::touch(Cell& c, const Access& a, bool same_value) {
  const Event now{a.warp->slot, a.warp->knows.seen.get(a.warp->slot), static_cast<u32>(a.pc)};
  const bool written = c.flags & kWritten, both_strong = a.strong && (c.flags & kStrongWrite);
  if (c.flags & kCopyTarget) race("race: under an asynchronous copy", a, c.write, c.write_lane);
  if (a.write && c.copies_from) race("race: source of an asynchronous copy", a, c.write, -1);
  if (written && !both_strong && !ordered(c.write, c.write_lane, c.flags & kByAsync, a)) {
    const bool one_instruction =
        a.write && c.write.slot == now.slot && c.write.clock == now.clock && c.write.pc == now.pc;
    if (a.write && same_value) ++same_values;
    else if (one_instruction) race("write conflict: lanes store different values", a, c.write, c.write_lane);
    else race(a.write ? "race: write after write" : "race: read after write", a, c.write, c.write_lane);
  }
  if (!a.write) {
    if (!a.strong) remember_reader(c, a);
    return;
  }
  if (!same_value) check_readers(c, a);
  c.write = now;
  c.write_lane = static_cast<u8>(a.lane);
  c.flags = (c.flags & (kCopyTarget | kBarrierObject)) | kWritten | (a.strong ? kStrongWrite : 0);
  c.readers = -1;
}

// Through memory: what a warp knew at its fence, or knows now for a release, passes to who reads the address and fences.
void Machine::release(Warp& w, u64 address, bool now) {
  if (!now && !w.has_fence) return;
  released.try_emplace(address, nothing_known()).first->second.join(now ? w.knows : w.fenced);
  if (now) advance(w);
}
void Machine::acquire(Warp& w, u64 address, bool now) {
  const auto found = released.find(address);
  if (found == released.end()) return;
  w.acquired.join(found->second);
  if (now) w.knows.join(found->second);
}
void Machine::fence(Warp& w) {
  w.knows.join(w.acquired);
  w.fenced = w.knows;
  w.has_fence = true;
  advance(w);
}

}  // namespace ptx
