// cvta, mapa, getctarank and isspacep: between the windows of memory and generic addresses.
#include "lanes.h"

namespace ptx {
namespace {

u64 generic_shared(const Block& block, u32 offset) {
  return kSharedTag | (static_cast<u64>(block.rank) << kOffsetBits) | offset;
}

void to_space(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  each(lanes, [&](int l) {
    const u64 address = a[l] + 0;
    Machine::Place p;
    if (!m.locate(w, l, n, Space::Generic, address, p)) return;
    const Space wanted = n.space == Space::Const ? Space::Global : n.space;
    if (p.space != wanted) m.report("cvta of an address elsewhere", n.pc, m.where(w, l));
    d[l] = wanted == Space::Shared ? m.shared_address(w, *p.block, u32(p.address)) : p.address;
  });
}
void to_generic(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  each(lanes, [&](int l) {
    Machine::Place p;
    if (!m.locate(w, l, n, n.space, a[l], p)) return;
    d[l] = p.space == Space::Shared  ? generic_shared(*p.block, u32(p.address))
           : p.space == Space::Local ? p.address | kLocalTag
           : p.space == Space::Param ? p.address | kParamTag
                                     : p.address;
  });
}

// The same place in the shared memory of another block of the cluster.
void map_to_rank(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *rank = m.source(w, n.from[1]);
  each(lanes, [&](int l) {
    Machine::Place p;
    if (!m.locate(w, l, n, n.space, a[l], p)) return;
    if (p.space != Space::Shared) return m.report("mapa of an address that is not shared", n.pc, m.where(w, l));
    if (u32(rank[l]) >= u32(m.domain->cluster)) return m.report("mapa beyond the cluster", n.pc, m.where(w, l));
    const u32 offset = static_cast<u32>(p.address);
    const Block& there = *m.domain->blocks[m.cluster_first(*w.block) + u32(rank[l])];
    d[l] = n.space == Space::Shared ? (u64(u32(rank[l]) + 1) << kOffsetBits) | offset : generic_shared(there, offset);
  });
}
void rank_of_address(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  each(lanes, [&](int l) {
    Machine::Place p;
    if (!m.locate(w, l, n, n.space, a[l], p)) return;
    if (p.space != Space::Shared) return m.report("getctarank of an address that is not shared", n.pc, m.where(w, l));
    d[l] = p.block->rank - m.cluster_first(*w.block);
  });
}
void is_in_space(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  each(lanes, [&](int l) {
    Machine::Place p;
    d[l] = m.locate(w, l, n, Space::Generic, a[l], p) && p.space == n.space &&
           (p.space != Space::Shared || n.has(kClusterWindow) || p.block == w.block);
  });
}

}  // namespace

Handler address_handler(const Instruction& n) {
  if (n.name == "cvta") return n.says("to") ? to_space : to_generic;
  if (n.name == "mapa") return map_to_rank;
  if (n.name == "getctarank") return rank_of_address;
  if (n.name == "isspacep") return is_in_space;
  return nullptr;
}

}  // namespace ptx
