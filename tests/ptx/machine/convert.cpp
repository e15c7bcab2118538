// cvt: between all integer and floating-point types, in every rounding mode.
#include "lanes.h"

namespace ptx {
namespace {

// Sign-extended, or zero-extended, to the register.
template <class T>
u64 extended(T x) {
  return std::is_signed_v<T> ? static_cast<u64>(static_cast<i64>(x)) : static_cast<u64>(x);
}

template <class To, class From>
void integer_to_integer(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const bool sat = n.has(kSat);
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  constexpr __int128 lo = std::numeric_limits<To>::min(), hi = std::numeric_limits<To>::max();
  each(lanes, [&](int l) {
    const From x = Number<From>::get(a[l]);
    const __int128 v = x;
    d[l] = extended(sat ? static_cast<To>(v < lo ? lo : v > hi ? hi : v) : static_cast<To>(x));
  });
}

// A long double holds every integer and every float exactly.
template <class To, class From>
void integer_to_float(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const Round round = n.round;
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  each(lanes, [&](int l) {
    const long double y = rounded(static_cast<long double>(Number<From>::get(a[l])), Number<To>::format, round);
    const auto x = static_cast<typename Number<To>::C>(y);
    d[l] = Number<To>::put(n.has(kSat) ? saturated(x) : x);
  });
}

// Clamped to the range; a NaN gives 0.
template <class To, class From>
void float_to_integer(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const Round round = n.round;
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  constexpr To lo = std::numeric_limits<To>::min(), hi = std::numeric_limits<To>::max();
  each(lanes, [&](int l) {
    const auto x = flushed(Number<From>::get(a[l]), n.has(kFtz));
    const long double y = to_integer(x, round);
    const To r = x != x ? To(0) : y <= lo ? lo : y >= static_cast<long double>(hi) ? hi : static_cast<To>(y);
    d[l] = extended(r);
  });
}

template <class To>
u64 narrowed(double x, const Instruction& n, Round round) {
  using C = typename Number<To>::C;
  if (n.has(kToInteger)) x = static_cast<double>(to_integer(x, round));
  if (n.has(kRelu) && !(x > 0) && x == x) x = 0;
  if (n.has(kSat)) x = saturated(x);
  long double y = rounded(x, Number<To>::format, n.has(kToInteger) ? Round::Nearest : round);
  if (n.says("satfinite") && std::isinf(y)) y = rounded(std::copysign(1e300, x), Number<To>::format, Round::Zero);
  return Number<To>::put(flushed(static_cast<C>(y), n.has(kFtz)));
}
template <class To, class From>
void float_to_float(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const Round round = n.round;
  const bool plain = n.flags == 0 && n.rest.empty();
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  if (plain && std::is_same_v<To, Brain> && std::is_same_v<From, float> && round == Round::Nearest) {
    each(lanes, [&](int l) { d[l] = brain_of(Number<float>::get(a[l])); });
  } else if (plain && round == Round::None) {  // widens
    each(lanes, [&](int l) { d[l] = Number<To>::put(static_cast<typename Number<To>::C>(Number<From>::get(a[l]))); });
  } else {
    each(lanes, [&](int l) { d[l] = narrowed<To>(flushed(Number<From>::get(a[l]), n.has(kFtz)), n, round); });
  }
}
// Two singles to a pair of halves; the first is the upper.
template <class To>
void to_pair(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  each(lanes, [&](int l) {
    d[l] = narrowed<To>(Number<float>::get(a[l]), n, n.round) << 16 | narrowed<To>(Number<float>::get(b[l]), n, n.round);
  });
}

Handler of_integers(const Instruction& n) {
  return with_integer(n.type, [&](auto to) {
    return with_integer(n.type2, [](auto from) -> Handler { return integer_to_integer<decltype(to), decltype(from)>; });
  });
}
Handler from_integer(const Instruction& n) {
  return with_float(n.type, [&](auto to) {
    return with_integer(n.type2, [](auto from) -> Handler { return integer_to_float<decltype(to), decltype(from)>; });
  });
}
Handler into_integer(const Instruction& n) {
  if (!n.has(kToInteger)) throw Unsupported("cvt to an integer without a rounding mode");
  return with_integer(n.type, [&](auto to) {
    return with_float(n.type2, [](auto from) -> Handler { return float_to_integer<decltype(to), decltype(from)>; });
  });
}
Handler of_floats(const Instruction& n) {
  return with_float(n.type, [&](auto to) {
    return with_float(n.type2, [](auto from) -> Handler { return float_to_float<decltype(to), decltype(from)>; });
  });
}

}  // namespace

Handler convert_handler(const Instruction& n) {
  if (n.name != "cvt") return nullptr;
  if (!n.rest.empty() && n.rest != ".satfinite") throw Unsupported("modifier " + n.rest);
  if (n.type == Type::F16x2 || n.type == Type::BF16x2) {
    expect(n, kRelu, 2);
    if (n.type2 != Type::F32 || n.round == Round::None) throw Unsupported("form of a packed cvt");
    return n.type == Type::F16x2 ? to_pair<Half> : to_pair<Brain>;
  }
  expect(n, kFtz | kSat | kRelu | kToInteger, 1);
  if (is_integer(n.type)) return is_integer(n.type2) ? of_integers(n) : into_integer(n);
  return is_integer(n.type2) ? from_integer(n) : of_floats(n);
}

}  // namespace ptx
