// Instructions that the member lanes of a warp execute together.
#include "lanes.h"

namespace ptx {
namespace {

// The lane that shfl reads, and whether it lies within the segment.
template <class Choose>
void shuffle(Machine& m, Warp& w, const Instruction& n, u32 lanes, Choose&& choose) {
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]), *c = m.source(w, n.from[2]);
  u64 value[kLanes];
  u32 valid = 0;
  each(lanes, [&](int l) {
    const int segment = (c[l] >> 8) & 31, clamp = c[l] & 31;
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int from = 0;
    const bool inside = choose(l, static_cast<int>(b[l] & 31), segment, least, most, from);
    if (!inside) from = l;
    valid |= u32(inside) << l;
    if (!(lanes >> from & 1)) m.report("shfl reads a lane that does not take part", n.pc, m.where(w, l));
    value[l] = lanes >> from & 1 ? u32(a[from]) : 0xffffffffu;
  });
  each(lanes, [&](int l) {
    m.target(w, n.to[0])[l] = value[l];
    if (n.to.size() > 1) m.target(w, n.to[1])[l] = valid >> l & 1;
  });
}
void shuffle_up(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  shuffle(m, w, n, lanes, [](int l, int b, int, int, int most, int& from) { return (from = l - b) >= most; });
}
void shuffle_down(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  shuffle(m, w, n, lanes, [](int l, int b, int, int, int most, int& from) { return (from = l + b) <= most; });
}
void shuffle_butterfly(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  shuffle(m, w, n, lanes, [](int l, int b, int, int, int most, int& from) { return (from = l ^ b) <= most; });
}
void shuffle_index(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  shuffle(m, w, n, lanes, [](int, int b, int segment, int least, int most, int& from) {
    return (from = least | (b & ~segment)) <= most;
  });
}

void vote(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64* p = m.source(w, n.from[0]);
  u32 yes = 0;
  each(lanes, [&](int l) { yes |= u32((p[l] & 1) != u64(n.negated[0])) << l; });
  const u64 r = n.says("ballot") ? yes : n.says("all") ? yes == lanes : n.says("any") ? yes != 0 : yes == lanes || !yes;
  each(lanes, [&](int l) { m.target(w, n.to[0])[l] = r; });
}

// match.any: the lanes with the same value; match.all: all of them, or none.
void match(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64* a = m.source(w, n.from[0]);
  const u64 mask = mask_of(bytes_of(n.type));
  u32 same[kLanes];
  each(lanes, [&](int l) {
    same[l] = 0;
    each(lanes, [&](int k) { same[l] |= u32((a[k] & mask) == (a[l] & mask)) << k; });
  });
  const bool all = n.says("all");
  each(lanes, [&](int l) {
    const bool every = same[l] == lanes;
    m.target(w, n.to[0])[l] = all && !every ? 0 : same[l];
    if (n.to.size() > 1) m.target(w, n.to[1])[l] = every;
  });
}

template <class T, class F>
void reduce(Machine& m, Warp& w, const Instruction& n, u32 lanes, F&& f) {
  const u64* a = m.source(w, n.from[0]);
  bool first = true;
  typename Number<T>::C total{};
  each(lanes, [&](int l) {
    const auto x = Number<T>::get(a[l]);
    total = first ? x : f(total, x);
    first = false;
  });
  each(lanes, [&](int l) { m.target(w, n.to[0])[l] = Number<T>::put(total); });
}
void reduce_integers(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const auto bits = [&](auto f) { reduce<u32>(m, w, n, lanes, f); };
  if (n.says("and")) return bits([](u32 a, u32 b) { return a & b; });
  if (n.says("or")) return bits([](u32 a, u32 b) { return a | b; });
  if (n.says("xor")) return bits([](u32 a, u32 b) { return a ^ b; });
  if (n.says("add")) return bits([](u32 a, u32 b) { return a + b; });
  const bool least = n.says("min");
  if (n.type == Type::S32) return reduce<i32>(m, w, n, lanes, [&](i32 a, i32 b) { return (a < b) == least ? a : b; });
  bits([&](u32 a, u32 b) { return (a < b) == least ? a : b; });
}
void reduce_floats(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const bool least = n.says("min"), magnitude = n.says("abs");
  reduce<float>(m, w, n, lanes, [&](float a, float b) {
    if (magnitude) a = std::fabs(a), b = std::fabs(b);
    return least ? smaller(a, b, n.has(kNanWins)) : larger(a, b, n.has(kNanWins));
  });
}

void elect(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const int leader = std::countr_zero(lanes);
  each(lanes, [&](int l) {
    m.target(w, n.to[0])[l] = leader;
    if (n.to.size() > 1) m.target(w, n.to[1])[l] = l == leader;
  });
}
void synchronise(Machine& m, Warp& w, const Instruction&, u32) { m.order_lanes(w); }  // bar.warp.sync

Handler shuffle_handler(const Instruction& n) {
  if (n.from.size() != 4) throw Unsupported("shfl without .sync");
  return n.says("up") ? shuffle_up : n.says("down") ? shuffle_down : n.says("bfly") ? shuffle_butterfly : shuffle_index;
}

}  // namespace

Handler warp_handler(const Instruction& n) {
  if (n.name == "bar" && n.says("warp")) return synchronise;
  if (n.name != "shfl" && n.name != "vote" && n.name != "match" && n.name != "redux" && n.name != "elect") return nullptr;
  if (!n.says("sync")) throw Unsupported("a form without .sync");
  if (n.name == "shfl") return shuffle_handler(n);
  if (n.name == "vote") return vote;
  if (n.name == "match") return match;
  if (n.name == "elect") return elect;
  return n.type == Type::F32 ? reduce_floats : reduce_integers;
}

}  // namespace ptx
