// Loops over the lanes of an instruction: the operands of a family of opcodes as typed values.
#pragma once

#include "machine.h"

namespace ptx {

template <class T, class F>
void unary(Machine& m, Warp& w, const Instruction& n, u32 lanes, F&& f) {
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  each(lanes, [&](int l) { d[l] = Number<T>::put(f(Number<T>::get(a[l]))); });
}
template <class T, class F>
void binary(Machine& m, Warp& w, const Instruction& n, u32 lanes, F&& f) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  each(lanes, [&](int l) { d[l] = Number<T>::put(f(Number<T>::get(a[l]), Number<T>::get(b[l]))); });
}
template <class T, class F>
void ternary(Machine& m, Warp& w, const Instruction& n, u32 lanes, F&& f) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]), *c = m.source(w, n.from[2]);
  each(lanes, [&](int l) { d[l] = Number<T>::put(f(Number<T>::get(a[l]), Number<T>::get(b[l]), Number<T>::get(c[l]))); });
}
// On raw bits.
template <class F>
void bitwise(Machine& m, Warp& w, const Instruction& n, u32 lanes, F&& f) {
  u64* d = m.target(w, n.to[0]);
  const u64* s[4];
  for (size_t i = 0; i < 4; ++i) s[i] = m.source(w, n.from[std::min(i, n.from.size() - 1)]);
  const u64 mask = n.type == Type::Pred ? 1 : mask_of(bytes_of(n.type));
  each(lanes, [&](int l) { d[l] = f(s[0][l], s[1][l], s[2][l], s[3][l]) & mask; });
}

inline bool only(const Instruction& n, u32 flags) { return !(n.flags & ~flags); }
// Refuses a form with other modifiers or another number of operands than a family knows.
inline void expect(const Instruction& n, u32 flags, size_t operands) {
  if (!only(n, flags)) throw Unsupported("modifier");
  if (n.from.size() != operands || n.to.empty()) throw Unsupported("number of operands");
}
inline void expect_plain(const Instruction& n, u32 flags, size_t operands) {
  if (!n.rest.empty()) throw Unsupported("modifier " + n.rest);
  expect(n, flags, operands);
}

}  // namespace ptx
