// Where an address leads, and the checks of every access: bounds, alignment, initialisation, races.
#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr u16 kPoison = 0xffa5;  // a NaN in every format that no arithmetic gives

bool is_poison(u64 address, int size) {
  if (size == 1) return is_poison(address & ~3ull, 4);  // a byte alone may have any value
  for (u64 a = address; a + 2 <= address + size; a += 2) {
    u16 bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(a), 2);
    if (bits == kPoison) continue;
    return false;
  }
  return true;
}
// A vector is read as a whole: each of its elements counts.
bool any_poison(u64 address, int size) {
  const int element = std::min(size, 4);
  for (int i = 0; i < size; i += element)
    if (is_poison(address + i, element)) return true;
  return false;
}
std::string access_name(Space space, const char* verb) {
  static const std::map<Space, std::string> names = {
      {Space::Global, "global "}, {Space::Shared, "shared "}, {Space::Local, "local "}, {Space::Param, "parameter "}};
  return names.at(space) + verb;
}
std::string bytes(int size) { return " of " + std::to_string(size) + " bytes"; }

}  // namespace

const PtxAllocation* Machine::allocation_of(u64 a, u64 size) {
  const auto holds = [&](const PtxAllocation& x) { return a >= x.begin && a + size <= x.end && a + size >= a; };
  if (last_allocation < allocations.size() && holds(allocations[last_allocation])) return &allocations[last_allocation];
  const auto after = std::upper_bound(allocations.begin(), allocations.end(), a,
                                      [](u64 x, const PtxAllocation& y) { return x < y.begin; });
  if (after == allocations.begin() || !holds(after[-1])) return nullptr;
  last_allocation = static_cast<size_t>(after - allocations.begin()) - 1;
  return &allocations[last_allocation];
}

std::string Machine::nearest_allocation(u64 a) const {
  constexpr u64 kNear = 4096;
  for (const auto& x : allocations) {
    const std::string size = " an allocation of " + std::to_string(x.end - x.begin) + " bytes";
    if (a + 16 > x.end && a < x.end + kNear) return ", " + std::to_string(i64(a - x.end)) + " bytes past" + size;
    if (a < x.begin && a + kNear > x.begin) return ", " + std::to_string(x.begin - a) + " bytes before" + size;
  }
  return ", far from every allocation";
}

u32 Machine::shared_address(const Warp& w, const Block& block, u32 offset) const {
  if (&block == w.block) return offset;
  return (static_cast<u32>(block.rank - cluster_first(block) + 1) << kOffsetBits) | offset;
}

bool Machine::locate_shared(Warp& w, int lane, const Instruction& n, u32 address, Place& place) {
  const u32 rank = address >> kOffsetBits;
  place = {Space::Shared, address & kOffsetMask, w.block};
  if (!rank) return true;
  if (static_cast<int>(rank) > domain->cluster) {
    report("out of bounds shared access", n.pc, where(w, lane) + " of a block beyond the cluster");
    return false;
  }
  place.block = domain->blocks[cluster_first(*w.block) + static_cast<int>(rank) - 1].get();
  return true;
}

bool Machine::locate(Warp& w, int lane, const Instruction& n, Space space, u64 a, Place& place) {
  place = {space == Space::Const ? Space::Global : space, a, w.block};
  if (space == Space::Shared) return locate_shared(w, lane, n, static_cast<u32>(a), place);
  if (space != Space::Generic) return true;
  const u64 tag = a & kTagMask;
  if (tag == kLocalTag || tag == kParamTag) {
    place = {tag == kLocalTag ? Space::Local : Space::Param, a & ~kTagMask, w.block};
  } else if (tag == kSharedTag) {
    const int rank = static_cast<int>((a >> kOffsetBits) & 0xffffff), first = cluster_first(*w.block);
    if (rank < first || rank >= first + domain->cluster) {
      report("out of bounds shared access", n.pc, where(w, lane) + " of a block of another cluster");
      return false;
    }
    place = {Space::Shared, a & kOffsetMask, domain->blocks[rank].get()};
  } else {
    place.space = Space::Global;
  }
  return true;
}

// Bounds, and alignment at the size or as told; false where nothing may be touched.
bool Machine::within(Warp& w, int lane, const Instruction& n, const Place& p, int size, const char* verb, int unit) {
  const u64 off = p.address % (unit ? unit : size);
  if (off)
    report("misaligned " + access_name(p.space, verb), n.pc,
           where(w, lane) + bytes(size) + ", off by " + std::to_string(off));
  const auto out = [&](const std::string& what) {
    report("out of bounds " + access_name(p.space, verb), n.pc, where(w, lane) + bytes(size) + what);
    return false;
  };
  switch (p.space) {
    case Space::Global:
      return allocation_of(p.address, size) ? true : out(nearest_allocation(p.address));
    case Space::Shared: {
      const u64 end = p.block->shared.size();
      if (p.address < kSharedBase || p.address + size > end)
        return out(" at " + std::to_string(i64(p.address) - kSharedBase) + " of " + std::to_string(end - kSharedBase));
      if (!p.block->live) report("shared memory of a block that has exited", n.pc, where(w, lane));
      return true;
    }
    case Space::Local:
      return p.address + size <= u64(entry.local_bytes) ? true : out(" at " + std::to_string(p.address));
    default:
      return p.address + size <= u64(entry.parameter_bytes) ? true : out(" at " + std::to_string(p.address));
  }
}

u8* Machine::bytes_at(Warp& w, int lane, const Place& p) {
  switch (p.space) {
    case Space::Global: return reinterpret_cast<u8*>(p.address);
    case Space::Shared: return p.block->shared.data() + p.address;
    case Space::Local: return w.block->local.data() + (size_t(w.index) * kLanes + lane) * entry.local_bytes + p.address;
    default: return const_cast<u8*>(launch.parameters) + p.address;
  }
}

// Of shared or global memory; null elsewhere, where only one thread comes.
Shadow* Machine::shadow_of(const Place& p) {
  if (p.space == Space::Shared) return &p.block->shadow;
  if (p.space != Space::Global || !launch.races) return nullptr;
  const PtxAllocation* x = allocation_of(p.address, 1);
  Shadow& shadow = global_shadow[x - allocations.data()];
  if (shadow.empty()) shadow = Shadow(x->end - x->begin);
  return &shadow;
}

namespace {

size_t shadow_offset(Machine& m, const Machine::Place& p) {
  return p.space == Space::Shared ? p.address : p.address - m.allocation_of(p.address, 1)->begin;
}
u64 shown_address(const Machine::Place& p) { return p.space == Space::Shared ? p.address - kSharedBase : p.address; }

}  // namespace

void Machine::load(Warp& w, int lane, const Instruction& n, u64 address, void* to, int size) {
  Place p;
  if (!locate(w, lane, n, n.space, address, p) || !within(w, lane, n, p, size, "read")) {
    std::memset(to, 0xff, size);
    return;
  }
  const bool strong = n.has(kStrong);
  std::memcpy(to, bytes_at(w, lane, p), size);
  if (p.space == Space::Global) {
    if (launch.poisoned && any_poison(p.address, size))
      report("uninitialised global read", n.pc, where(w, lane) + bytes(size) + " from memory that nothing has written");
  }
  if (strong) acquire(w, reinterpret_cast<u64>(bytes_at(w, lane, p)), n.has(kAcquire));
  Shadow* shadow = shadow_of(p);
  if (!shadow) return;
  Access a{&w, lane, n.pc, false, false, strong, p.space == Space::Shared ? "shared" : "global", 0};
  const size_t first = shadow_offset(*this, p);
  shadow->each(first, size, [&](Cell& c, size_t offset, int) {
    a.address = shown_address(p) + (offset - first);
    if (p.space == Space::Shared) {
      if (!(c.flags & (kWritten | kCopyTarget))) report("uninitialised shared read", n.pc, where(w, lane) + " at " + std::to_string(a.address));
      if (c.flags & kBarrierObject) report("plain access to an mbarrier", n.pc, where(w, lane));
    } else if (n.has(kNonCoherent) && (c.flags & kWritten)) {
      report("non-coherent read of what this launch writes", n.pc, where(w, lane), static_cast<int>(c.write.pc));
    }
    if (launch.races) touch(c, a, false);
  });
}

void Machine::store(Warp& w, int lane, const Instruction& n, u64 address, const void* from, int size) {
  Place p;
  if (!locate(w, lane, n, n.space, address, p) || !within(w, lane, n, p, size, "write")) return;
  if (p.space == Space::Param) return report("write to a parameter", n.pc, where(w, lane));
  const bool strong = n.has(kStrong);
  u8* to = bytes_at(w, lane, p);
  if (strong) release(w, reinterpret_cast<u64>(to), n.has(kRelease));
  if (Shadow* shadow = shadow_of(p)) {
    Access a{&w, lane, n.pc, true, false, strong, p.space == Space::Shared ? "shared" : "global", 0};
    const size_t first = shadow_offset(*this, p);
    shadow->each(first, size, [&](Cell& c, size_t offset, int cell_bytes) {
      const size_t i = offset - first;
      a.address = shown_address(p) + i;
      if (c.flags & kBarrierObject) report("plain access to an mbarrier", n.pc, where(w, lane));
      const bool same = (c.flags & kWritten) && !std::memcmp(to + i, static_cast<const u8*>(from) + i, cell_bytes);
      if (launch.races) touch(c, a, same);
      else c.flags |= kWritten;
    });
  }
  std::memcpy(to, from, size);
  if (p.space != Space::Local) make_progress();
}

// ---- instructions ---------------------------------------------------------------------------------------------------
namespace {

u64 widened(Type t, const u8* p) {
  u64 v = 0;
  std::memcpy(&v, p, std::min(8, bytes_of(t)));
  if (t == Type::S8) return static_cast<u64>(static_cast<i8>(v));
  if (t == Type::S16) return static_cast<u64>(static_cast<i16>(v));
  if (t == Type::S32) return static_cast<u64>(static_cast<i32>(v));  // the register may be wider
  return v;
}

void count(Machine& m, Warp& w, const Instruction& n, u32 lanes, int size) {
  u64 addresses[kLanes];
  u32 global = 0, shared = 0;
  const u64* base = m.source(w, n.at[0].base);
  each(lanes, [&](int l) {
    Machine::Place p;
    addresses[l] = base[l] + n.at[0].offset;
    if (!m.locate(w, l, n, n.space, addresses[l], p)) return;
    if (p.space == Space::Global) global |= 1u << l;
    if (p.space == Space::Shared) shared |= 1u << l;
  });
  if (global) count_global(m.counters[n.pc], global, addresses, size);
  if (shared) count_shared(m.counters[n.pc], shared, addresses, size);
}

void run_load(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const int element = bytes_of(n.type), size = element * n.vector;
  const u64* base = m.source(w, n.at[0].base);
  u64 addresses[kLanes];
  each(lanes, [&](int l) { addresses[l] = base[l] + n.at[0].offset; });  // before a target overwrites the base
  if (m.launch.count) count(m, w, n, lanes, size);
  each(lanes, [&](int l) {
    u8 buffer[64];
    m.load(w, l, n, addresses[l], buffer, size);
    for (int v = 0; v < n.vector; ++v) m.target(w, n.to[v])[l] = widened(n.type, buffer + v * element);
  });
  if (n.has(kStrong)) m.poll(w, n.pc);
}

void run_store(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const int element = bytes_of(n.type), size = element * n.vector;
  const u64* base = m.source(w, n.at[0].base);
  const auto one = [&](int l) {
    u8 buffer[64];
    for (int v = 0; v < n.vector; ++v) std::memcpy(buffer + v * element, &m.source(w, n.from[v])[l], element);
    m.store(w, l, n, base[l] + n.at[0].offset, buffer, size);
  };
  if (m.launch.count) count(m, w, n, lanes, size);
  if (m.launch.reversed) {
    for (int l = kLanes - 1; l >= 0; --l)
      if (lanes >> l & 1) one(l);
  } else {
    each(lanes, one);
  }
}

// ldmatrix, stmatrix: lane l of group k names row l of matrix k of 8 x 8 elements of 16 bits.
void matrix(Machine& m, Warp& w, const Instruction& n, bool storing) {
  const u64* base = m.source(w, n.at[0].base);
  u64 rows[kLanes];
  for (int l = 0; l < kLanes; ++l) rows[l] = base[l] + n.at[0].offset;
  const auto place_of = [&](int lane, int half) {
    const int row = lane / 4, column = 2 * (lane % 4) + half;
    return n.has(kTranspose) ? column * 8 + row : row * 8 + column;
  };
  for (int k = 0; k < n.vector; ++k) {
    u16 tile[64];
    for (int l = 0; l < kLanes && storing; ++l)
      for (int half = 0; half < 2; ++half) tile[place_of(l, half)] = u16(m.source(w, n.from[k])[l] >> (16 * half));
    for (int r = 0; r < 8; ++r) {
      if (storing) m.store(w, k * 8 + r, n, rows[k * 8 + r], tile + 8 * r, 16);
      else m.load(w, k * 8 + r, n, rows[k * 8 + r], tile + 8 * r, 16);
    }
    for (int l = 0; l < kLanes && !storing; ++l)
      m.target(w, n.to[k])[l] = tile[place_of(l, 0)] | u32(tile[place_of(l, 1)]) << 16;
    if (m.launch.count) count_shared(m.counters[n.pc], 0xff, rows + k * 8, 16);
  }
}
void run_matrix_load(Machine& m, Warp& w, const Instruction& n, u32) { matrix(m, w, n, false); }
void run_matrix_store(Machine& m, Warp& w, const Instruction& n, u32) { matrix(m, w, n, true); }
void nothing(Machine&, Warp&, const Instruction&, u32) {}

}  // namespace

Handler memory_handler(const Instruction& n) {
  if (n.name == "prefetch" || n.name == "prefetchu" || n.name == "discard" || n.name == "applypriority") return nothing;
  if (n.name == "ldmatrix" || n.name == "stmatrix") {
    if (!n.says("m8n8") || n.type != Type::B16) throw Unsupported("shape of a matrix move");
    return n.name == "ldmatrix" ? run_matrix_load : run_matrix_store;
  }
  const bool loads = n.name == "ld" || n.name == "ldu", asynchronous = n.says("async");
  if ((!loads && n.name != "st") || asynchronous) return nullptr;
  if (n.type == Type::B128 || bytes_of(n.type) * n.vector > 32) throw Unsupported("width of a load or store");
  const size_t values = loads ? n.to.size() : n.from.size() - (n.says("cache_hint") ? 1 : 0);
  if (values != n.vector) throw Unsupported("number of operands");
  return loads ? run_load : run_store;
}

}  // namespace ptx
