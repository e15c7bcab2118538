// Bulk copies and reductions, which complete on an mbarrier or in a group of the thread; st.async and red.async.
#include <cstring>

#include "lanes.h"

namespace ptx {
namespace {

u64 operand_address(Machine& m, Warp& w, const Instruction& n, size_t i, int lane) {
  return m.source(w, n.at[i].base)[lane] + n.at[i].offset;
}

const char* const kReductions[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor"};
std::string reduction(const Instruction& n) {
  for (const char* op : kReductions)
    if (n.says(op)) return op;
  throw Unsupported("operation of an asynchronous reduction");
}
bool on_mbarrier(const Instruction& n) { return n.says("mbarrier::complete_tx::bytes"); }

CopyPointer new_copy(Warp& w, int lane, const Instruction& n, const Machine::Place& to) {
  auto c = std::make_shared<Copy>();
  c->to_block = to.space == Space::Shared ? to.block : nullptr;
  c->to = to.address;
  c->warp = &w, c->lane = lane, c->instruction = &n;
  return c;
}

// Hands a copy to an mbarrier in the block it goes to.
void complete_on(Machine& m, Warp& w, int lane, const Instruction& n, const CopyPointer& c, u64 barrier_address) {
  Machine::Place p;
  if (!m.mbarrier(w, lane, n, barrier_address, n.has(kClusterWindow) || n.space == Space::Shared ? Space::Shared : Space::Generic, p)) return;
  if (c->to_block && p.block != c->to_block)
    m.report("mbarrier in another block than what is copied", n.pc, m.where(w, lane));
  m.domain->in_flight.push_back({{c}, p.block, u32(p.address), c->size, false, &n});
}

// To one block, or with .multicast to the same offset of several, each with its own mbarrier.
void copy_to(Machine& m, Warp& w, const Instruction& n, int l, const Machine::Place& to, const Machine::Place& from) {
  auto c = new_copy(w, l, n, to);
  c->async_proxy = true;
  c->from_block = from.space == Space::Shared ? from.block : nullptr;
  c->from = from.address;
  c->size = c->source_bytes = u32(m.source(w, n.from[0])[l]);
  if (n.says("reduce")) c->reduction = reduction(n), c->type = n.type;
  if (!m.issue(*c)) return;
  if (on_mbarrier(n)) {
    u64 barrier = operand_address(m, w, n, 2, l);
    if (n.says("multicast::cluster")) barrier = m.shared_address(w, *to.block, u32(barrier) & kOffsetMask);
    complete_on(m, w, l, n, c, barrier);
  } else {
    w.bulk[l].open.push_back(c);
  }
}
void copy(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  each(lanes, [&](int l) {
    Machine::Place to, from;
    if (!m.locate(w, l, n, n.space, operand_address(m, w, n, 0, l), to)) return;
    if (!m.locate(w, l, n, n.space2, operand_address(m, w, n, 1, l), from)) return;
    if (!n.says("multicast::cluster")) return copy_to(m, w, n, l, to, from);
    const u32 ranks = u32(m.source(w, n.from[1])[l]);
    for (int rank = 0; rank < 16; ++rank) {
      if (!(ranks >> rank & 1)) continue;
      if (rank >= m.domain->cluster) return m.report("multicast beyond the cluster", n.pc, m.where(w, l));
      to.block = m.domain->blocks[m.cluster_first(*w.block) + rank].get();
      copy_to(m, w, n, l, to, from);
    }
  });
  if (m.launch.count) {
    Counter& counter = m.counters[n.pc];
    each(lanes, [&](int l) { ++counter.lanes, counter.bytes += u32(m.source(w, n.from[0])[l]); });
  }
}
void prefetch(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  each(lanes, [&](int l) {
    const Machine::Place p{Space::Global, operand_address(m, w, n, 0, l), w.block};
    const int size = static_cast<int>(m.source(w, n.from[0])[l]);
    if (size % 16) m.report("size of a bulk copy is not a multiple of 16", n.pc, m.where(w, l));
    m.within(w, l, n, p, size, "read", 16);
  });
}

void commit(Machine&, Warp& w, const Instruction&, u32 lanes) {
  each(lanes, [&](int l) {
    w.bulk[l].closed.push_back(std::move(w.bulk[l].open));
    w.bulk[l].open.clear();
  });
}
// wait_group.read: the sources have been read and may change; the writes come later still.
void wait(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const bool only_read = n.says("read");
  each(lanes, [&](int l) {
    auto& groups = w.bulk[l].closed;
    const u64 keep = m.source(w, n.from[0])[l];
    for (size_t i = 0; i + keep < groups.size(); ++i)
      for (const auto& c : groups[i]) {
        if (!only_read) m.land_for_thread(*c);
        else if (!c->read) m.read_source(*c), m.domain->stores.push_back(c);
      }
    while (!only_read && groups.size() > keep) groups.pop_front();
  });
}

// A value of the thread into a block of the cluster.
void send(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const int element = bytes_of(n.type);
  each(lanes, [&](int l) {
    Machine::Place to;
    if (!m.locate(w, l, n, Space::Shared, operand_address(m, w, n, 0, l), to)) return;
    auto c = new_copy(w, l, n, to);
    c->immediate = true;
    c->size = u32(element * n.vector);
    c->data.resize(c->size);
    for (int v = 0; v < n.vector; ++v) std::memcpy(&c->data[v * element], &m.source(w, n.from[v])[l], element);
    if (n.name == "red") c->reduction = reduction(n), c->type = n.type;
    if (m.issue(*c)) complete_on(m, w, l, n, c, operand_address(m, w, n, 1, l));
  });
}

}  // namespace

Handler bulk_handler(const Instruction& n) {
  if ((n.name == "st" || n.name == "red") && n.says("async")) {
    if (!on_mbarrier(n) || n.at.size() != 2 || n.from.size() != n.vector) throw Unsupported("form of an async store");
    return send;
  }
  if (n.name != "cp" || !n.says("bulk")) return nullptr;
  if (n.says("tensor")) throw Unsupported("tensor maps");
  if (n.says("commit_group")) return commit;
  if (n.says("wait_group")) return wait;
  if (n.says("prefetch")) return prefetch;
  if (n.says("reduce")) reduction(n);
  const size_t addresses = on_mbarrier(n) ? 3 : 2;
  if (n.at.size() != addresses || n.from.empty() || n.says("cp_mask")) throw Unsupported("form of a bulk copy");
  return copy;
}

}  // namespace ptx
