// setp, set, slct and testp.
#include "lanes.h"

namespace ptx {
namespace {

template <class C>
bool holds(Compare compare, C a, C b) {
  const bool unordered = a != a || b != b;
  switch (compare) {
    case Compare::Eq: return a == b;
    case Compare::Ne: return !unordered && a != b;
    case Compare::Lt: return a < b;
    case Compare::Le: return a <= b;
    case Compare::Gt: return a > b;
    case Compare::Ge: return a >= b;
    case Compare::Equ: return unordered || a == b;
    case Compare::Neu: return unordered || a != b;
    case Compare::Ltu: return unordered || a < b;
    case Compare::Leu: return unordered || a <= b;
    case Compare::Gtu: return unordered || a > b;
    case Compare::Geu: return unordered || a >= b;
    case Compare::Num: return !unordered;
    default: return unordered;
  }
}
bool combined(Combine combine, bool a, bool b) {
  return combine == Combine::And ? a && b : combine == Combine::Or ? a || b : combine == Combine::Xor ? a != b : a;
}
bool third(Machine& m, Warp& w, const Instruction& n, int lane) {
  return n.combine != Combine::None && (m.source(w, n.from[2])[lane] & 1) != u64(n.negated[2]);
}

template <class T>
void set_predicate(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  const bool ftz = n.has(kFtz);
  each(lanes, [&](int l) {
    const bool r = holds(n.compare, flushed(Number<T>::get(a[l]), ftz), flushed(Number<T>::get(b[l]), ftz));
    const bool c = third(m, w, n, l);
    m.target(w, n.to[0])[l] = combined(n.combine, r, c);
    if (n.to.size() > 1) m.target(w, n.to[1])[l] = combined(n.combine, !r, c);
  });
}
// Of a pair: a predicate for each half.
template <class T>
void set_predicate_pair(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  each(lanes, [&](int l) {
    const bool c = third(m, w, n, l);
    for (int h = 0; h < 2; ++h) {
      const bool r = holds(n.compare, Number<T>::get(a[l] >> (16 * h)), Number<T>::get(b[l] >> (16 * h)));
      m.target(w, n.to[h])[l] = combined(n.combine, r, c);
    }
  });
}
// All ones, or 1.0, where the comparison holds.
template <class T>
void set_value(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  u64* d = m.target(w, n.to[0]);
  const u64 yes = n.type == Type::F32 ? std::bit_cast<u32>(1.0f) : mask_of(bytes_of(n.type));
  each(lanes, [&](int l) {
    const bool r = holds(n.compare, flushed(Number<T>::get(a[l]), n.has(kFtz)), flushed(Number<T>::get(b[l]), n.has(kFtz)));
    d[l] = combined(n.combine, r, third(m, w, n, l)) ? yes : 0;
  });
}
template <class T>
void select_by_sign(Machine& m, Warp& w, const Instruction& n, u32 lanes) {  // slct
  bitwise(m, w, n, lanes, [&](u64 a, u64 b, u64 c, u64) { return flushed(Number<T>::get(c), n.has(kFtz)) >= 0 ? a : b; });
}
template <class T>
void test_property(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  each(lanes, [&](int l) {
    const T x = Number<T>::get(a[l]);
    d[l] = n.says("finite")     ? std::isfinite(x)
           : n.says("infinite") ? std::isinf(x)
           : n.says("number")   ? !std::isnan(x)
           : n.says("notanumber") ? std::isnan(x)
           : n.says("normal")   ? std::isnormal(x)
                                : std::fpclassify(x) == FP_SUBNORMAL;
  });
}

template <class F>
Handler with_any(Type t, F&& f) {
  if (is_float(t)) return with_float(t, f);
  return with_integer(t, f);
}

}  // namespace

Handler compare_handler(const Instruction& n) {
  const size_t operands = n.combine == Combine::None ? 2 : 3;
  if (n.name == "setp") {
    expect_plain(n, kFtz, operands);
    if (n.compare == Compare::None) throw Unsupported("comparison");
    if (is_pair(n.type)) {
      if (n.to.size() != 2 || n.type == Type::F32x2) throw Unsupported("form of setp");
      return n.type == Type::F16x2 ? set_predicate_pair<Half> : set_predicate_pair<Brain>;
    }
    return with_any(n.type, [](auto x) -> Handler { return set_predicate<decltype(x)>; });
  }
  if (n.name == "set") {
    expect_plain(n, kFtz, operands);
    if (n.compare == Compare::None || (n.type != Type::F32 && !is_integer(n.type))) throw Unsupported("form of set");
    return with_any(n.type2, [](auto x) -> Handler { return set_value<decltype(x)>; });
  }
  if (n.name == "slct") {
    expect_plain(n, kFtz, 3);
    if (n.type2 == Type::F32) return select_by_sign<float>;
    if (n.type2 == Type::S32) return select_by_sign<i32>;
    throw Unsupported("type of slct");
  }
  if (n.name == "testp") {
    expect(n, 0, 1);
    return n.type == Type::F64 ? test_property<double> : test_property<float>;
  }
  return nullptr;
}

}  // namespace ptx
