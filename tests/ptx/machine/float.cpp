// Floating-point arithmetic that is rounded exactly: one rounding, in every mode, of every format and of pairs.
#include <cfenv>

#include "lanes.h"

namespace ptx {
namespace {

// Evaluates f as the processor does in a rounding mode; f must not be moved or folded, so its operands are volatile.
template <class F>
double in_mode(Round round, F&& f) {
  const int modes[] = {FE_TONEAREST, FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  std::fesetround(modes[static_cast<int>(round)]);
  const double r = f();
  std::fesetround(FE_TONEAREST);
  return r;
}
// What a sum of opposite numbers gives: -0 where rounding goes down.
template <class C>
C exact_zero(C sum, C a, C b, Round round) {
  return sum == 0 && round == Round::Down && (a != 0 || std::signbit(a) != std::signbit(b)) ? C(-0.0) : sum;
}

struct Add {
  static double exact(double a, double b) { return odd_sum(a, b); }
  template <class C>
  static C nearest(C a, C b) { return a + b; }
  template <class C>
  static C zero(C s, C a, C b, Round round) { return exact_zero(s, a, b, round); }
};
struct Subtract {
  static double exact(double a, double b) { return odd_sum(a, -b); }
  template <class C>
  static C nearest(C a, C b) { return a - b; }
  template <class C>
  static C zero(C s, C a, C b, Round round) { return exact_zero(s, a, -b, round); }
};
struct Multiply {
  static double exact(double a, double b) { return a * b; }  // of formats up to 24 bits
  template <class C>
  static C nearest(C a, C b) { return a * b; }
  template <class C>
  static C zero(C p, C, C, Round) { return p; }
};
struct Divide {
  static double exact(double a, double b) { return odd_quotient(a, b); }
  template <class C>
  static C nearest(C a, C b) { return a / b; }
  template <class C>
  static C zero(C q, C, C, Round) { return q; }
};

template <class T, class Operation>
u64 combined(u64 x, u64 y, bool ftz, bool sat, Round round) {
  using C = typename Number<T>::C;
  const C a = flushed(Number<T>::get(x), ftz), b = flushed(Number<T>::get(y), ftz);
  C r;
  if constexpr (std::is_same_v<T, double>) {
    const volatile double x = a, y = b;
    r = in_mode(round, [&] {
      const volatile double result = Operation::nearest(double(x), double(y));
      return double(result);
    });
  } else if (std::is_same_v<T, float> && round == Round::Nearest) {
    r = Operation::nearest(a, b);
  } else {
    r = static_cast<C>(rounded(Operation::exact(a, b), Number<T>::format, round));
  }
  r = flushed(Operation::zero(r, a, b, round), ftz);
  return Number<T>::put(sat ? saturated(r) : r);
}
template <class T>
u64 fused(u64 x, u64 y, u64 z, bool ftz, bool sat, bool relu, Round round) {
  using C = typename Number<T>::C;
  const C a = flushed(Number<T>::get(x), ftz), b = flushed(Number<T>::get(y), ftz), c = flushed(Number<T>::get(z), ftz);
  C r;
  if constexpr (std::is_same_v<T, double>) {
    const volatile double p = a, q = b, s = c;
    r = in_mode(round, [&] {
      const volatile double result = std::fma(double(p), double(q), double(s));
      return double(result);
    });
  } else if (std::is_same_v<T, float> && round == Round::Nearest) {
    r = std::fma(a, b, c);
  } else {  // the product is exact in double precision
    const double product = double(a) * double(b), sum = odd_sum(product, c);
    r = static_cast<C>(rounded(sum, Number<T>::format, round));
    if (sum == 0) r = static_cast<C>(exact_zero<double>(sum, product, c, round));
  }
  if (relu && !(r > 0) && r == r) r = 0;
  r = flushed(r, ftz);
  return Number<T>::put(sat ? saturated(r) : r);
}

Round mode(const Instruction& n) { return n.round == Round::None ? Round::Nearest : n.round; }

template <class T, class Operation>
void run_two(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  const bool ftz = n.has(kFtz), sat = n.has(kSat);
  const Round round = mode(n);
  each(lanes, [&](int l) { d[l] = combined<T, Operation>(a[l], b[l], ftz, sat, round); });
}
template <class T, class Operation>
void run_two_pairs(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  constexpr int half = std::is_same_v<T, float> ? 32 : 16;
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  const bool ftz = n.has(kFtz), sat = n.has(kSat);
  const Round round = mode(n);
  each(lanes, [&](int l) {
    const u64 low = combined<T, Operation>(a[l], b[l], ftz, sat, round);
    d[l] = low | combined<T, Operation>(a[l] >> half, b[l] >> half, ftz, sat, round) << half;
  });
}
template <class T>
void run_fused(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]), *c = m.source(w, n.from[2]);
  const bool ftz = n.has(kFtz), sat = n.has(kSat), relu = n.has(kRelu);
  const Round round = mode(n);
  each(lanes, [&](int l) { d[l] = fused<T>(a[l], b[l], c[l], ftz, sat, relu, round); });
}
template <class T>
void run_fused_pairs(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  constexpr int half = std::is_same_v<T, float> ? 32 : 16;
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]), *c = m.source(w, n.from[2]);
  const bool ftz = n.has(kFtz), sat = n.has(kSat), relu = n.has(kRelu);
  const Round round = mode(n);
  each(lanes, [&](int l) {
    const u64 low = fused<T>(a[l], b[l], c[l], ftz, sat, relu, round);
    d[l] = low | fused<T>(a[l] >> half, b[l] >> half, c[l] >> half, ftz, sat, relu, round) << half;
  });
}

// sm_100: add, sub and fma in single precision of operands in half precision.
template <class T>
void run_mixed(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const bool product = n.name == "fma";
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]), *c = m.source(w, n.from.back());
  const auto single = [](u64 half) { return Number<float>::put(static_cast<float>(Number<T>::get(half))); };
  const bool ftz = n.has(kFtz), sat = n.has(kSat);
  const Round round = mode(n);
  each(lanes, [&](int l) {
    const u64 x = single(a[l]);
    if (product) d[l] = fused<float>(x, single(b[l]), c[l], ftz, sat, false, round);
    else if (n.name == "add") d[l] = combined<float, Add>(x, b[l], ftz, sat, round);
    else d[l] = combined<float, Subtract>(x, b[l], ftz, sat, round);
  });
}

// min and max, of two or three operands; .xorsign.abs of two.
template <class T>
u64 extreme(const Instruction& n, bool least, u64 x, u64 y) {
  using C = typename Number<T>::C;
  C a = flushed(Number<T>::get(x), n.has(kFtz)), b = flushed(Number<T>::get(y), n.has(kFtz));
  const bool magnitude = n.says("abs");
  const bool negative = magnitude && std::signbit(a) != std::signbit(b);
  if (magnitude) a = std::fabs(a), b = std::fabs(b);
  const C r = least ? smaller(a, b, n.has(kNanWins)) : larger(a, b, n.has(kNanWins));
  return Number<T>::put(negative ? -r : r);
}
template <class T>
void run_extreme(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]), *c = m.source(w, n.from.back());
  const bool least = n.name == "min", three = n.from.size() == 3;
  each(lanes, [&](int l) {
    const u64 two = extreme<T>(n, least, a[l], b[l]);
    d[l] = three ? extreme<T>(n, least, two, c[l]) : two;
  });
}
template <class T>
void run_extreme_pairs(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  const bool least = n.name == "min";
  each(lanes, [&](int l) {
    d[l] = extreme<T>(n, least, a[l], b[l]) | extreme<T>(n, least, a[l] >> 16, b[l] >> 16) << 16;
  });
}

// abs and neg change a bit, and flush where they are told to.
void run_sign(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const int bits = 8 * bytes_of(n.type);
  const u64 sign = is_pair(n.type) ? (bits == 64 ? 0x8000000080000000ull : 0x80008000ull) : 1ull << (bits - 1);
  const bool negate = n.name == "neg", ftz = n.has(kFtz);
  bitwise(m, w, n, lanes, [&](u64 a, u64, u64, u64) {
    if (ftz && n.type == Type::F32) a = std::bit_cast<u32>(flush(Number<float>::get(a)));
    return negate ? a ^ sign : a & ~sign;
  });
}
void run_copysign(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64 sign = 1ull << (8 * bytes_of(n.type) - 1);
  bitwise(m, w, n, lanes, [&](u64 a, u64 b, u64, u64) { return (b & (sign - 1)) | (a & sign); });
}

// IEEE square root and reciprocal.
template <class T>
void run_root(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const bool ftz = n.has(kFtz);
  const Round round = mode(n);
  unary<T>(m, w, n, lanes, [&](T x) {
    const T a = flushed(x, ftz);
    if constexpr (std::is_same_v<T, double>) {
      const volatile double radicand = a;
      return in_mode(round, [&] {
        const volatile double result = std::sqrt(double(radicand));
        return double(result);
      });
    } else {
      return flushed(static_cast<T>(rounded(odd_root(a), kSingle, round)), ftz);
    }
  });
}
template <class T>
void run_reciprocal(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  const u64 one = Number<T>::put(T(1));
  each(lanes, [&](int l) { d[l] = combined<T, Divide>(one, a[l], n.has(kFtz), false, mode(n)); });
}

template <class Operation>
Handler two_operands(Type t) {
  switch (t) {
    case Type::F16x2: return run_two_pairs<Half, Operation>;
    case Type::BF16x2: return run_two_pairs<Brain, Operation>;
    case Type::F32x2: return run_two_pairs<float, Operation>;
    default: return with_float(t, [](auto x) -> Handler { return run_two<decltype(x), Operation>; });
  }
}
Handler fused_handler(const Instruction& n) {
  expect_plain(n, kFtz | kSat | kRelu, 3);
  switch (n.type) {
    case Type::F16x2: return run_fused_pairs<Half>;
    case Type::BF16x2: return run_fused_pairs<Brain>;
    case Type::F32x2: return run_fused_pairs<float>;
    default: return with_float(n.type, [](auto x) -> Handler { return run_fused<decltype(x)>; });
  }
}
Handler extreme_handler(const Instruction& n) {
  if (!n.rest.empty() && n.rest != ".xorsign.abs") throw Unsupported("modifier " + n.rest);
  expect(n, kFtz | kNanWins, n.from.size() == 3 && !is_pair(n.type) ? 3 : 2);
  if (n.type == Type::F16x2) return run_extreme_pairs<Half>;
  if (n.type == Type::BF16x2) return run_extreme_pairs<Brain>;
  return with_float(n.type, [](auto x) -> Handler { return run_extreme<decltype(x)>; });
}

}  // namespace

Handler float_handler(const Instruction& n) {
  const std::string& op = n.name;
  if (!is_float(n.type) && !is_pair(n.type)) return nullptr;
  if (n.type2 != Type::None && (op == "add" || op == "sub" || op == "fma")) {
    expect_plain(n, kFtz | kSat, op == "fma" ? 3 : 2);
    if (n.type != Type::F32 || (n.type2 != Type::F16 && n.type2 != Type::BF16)) throw Unsupported("mixed types");
    return n.type2 == Type::F16 ? run_mixed<Half> : run_mixed<Brain>;
  }
  if (n.type2 != Type::None) return nullptr;
  if (op == "fma" || op == "mad") return fused_handler(n);
  if (op == "min" || op == "max") return extreme_handler(n);
  if (op == "abs" || op == "neg") {
    expect_plain(n, kFtz, 1);
    return run_sign;
  }
  if (op == "copysign") {
    expect_plain(n, 0, 2);
    return run_copysign;
  }
  if (op == "add" || op == "sub" || op == "mul" || op == "div") {
    if (op == "div" && n.round == Round::None) return nullptr;  // approximate
    expect_plain(n, kFtz | kSat, 2);
    if (op == "add") return two_operands<Add>(n.type);
    if (op == "sub") return two_operands<Subtract>(n.type);
    return op == "mul" ? two_operands<Multiply>(n.type) : two_operands<Divide>(n.type);
  }
  if ((op == "sqrt" || op == "rcp") && !n.has(kApprox)) {
    expect_plain(n, kFtz, 1);
    if (n.type == Type::F32) return op == "sqrt" ? run_root<float> : run_reciprocal<float>;
    if (n.type == Type::F64) return op == "sqrt" ? run_root<double> : run_reciprocal<double>;
  }
  return nullptr;
}

}  // namespace ptx
