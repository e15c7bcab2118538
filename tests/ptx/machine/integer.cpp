// Integer arithmetic.
#include "lanes.h"

namespace ptx {
namespace {

template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;

// Sums wrap, whatever the sign.
template <class T>
T wrapped(unsigned __int128 x) {
  return static_cast<T>(x);
}
template <class T>
T high_half(T a, T b) {
  return static_cast<T>((Wide<T>(a) * Wide<T>(b)) >> (8 * sizeof(T)));
}
template <class T>
T clamped(Wide<T> x) {
  constexpr T lo = std::numeric_limits<T>::min(), hi = std::numeric_limits<T>::max();
  return x < lo ? lo : x > hi ? hi : static_cast<T>(x);
}

template <class T>
void add(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [](T a, T b) { return wrapped<T>((unsigned __int128)a + b); });
}
template <class T>
void add_saturated(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [](T a, T b) { return clamped<T>(Wide<T>(a) + b); });
}
template <class T>
void subtract(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [](T a, T b) { return wrapped<T>((unsigned __int128)a - b); });
}
template <class T>
void subtract_saturated(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [](T a, T b) { return clamped<T>(Wide<T>(a) - b); });
}
template <class T>
void multiply_low(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [](T a, T b) { return static_cast<T>(Wide<T>(a) * Wide<T>(b)); });
}
template <class T>
void multiply_high(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, high_half<T>);
}
template <class T>
void multiply_add_low(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  ternary<T>(m, w, n, lanes, [](T a, T b, T c) { return static_cast<T>(Wide<T>(a) * Wide<T>(b) + c); });
}
template <class T>
void multiply_add_high(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  ternary<T>(m, w, n, lanes, [](T a, T b, T c) { return wrapped<T>((unsigned __int128)high_half(a, b) + c); });
}
// Twice as wide as its operands; with a third, that is as wide as the result.
template <class T>
void multiply_wide(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]);
  const u64* c = n.from.size() > 2 ? m.source(w, n.from[2]) : nullptr;
  each(lanes, [&](int l) {
    const u64 product = static_cast<u64>(Wide<T>(Number<T>::get(a[l])) * Wide<T>(Number<T>::get(b[l])));
    d[l] = (product + (c ? c[l] : 0)) & mask_of(2 * sizeof(T));
  });
}

template <class T>
void divide(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [&](T a, T b) {
    if (b == 0) {
      m.report("integer division by zero", n.pc, m.where(w, std::countr_zero(lanes)));
      return static_cast<T>(-1);
    }
    return static_cast<T>(Wide<T>(a) / Wide<T>(b));
  });
}
template <class T>
void remainder(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [&](T a, T b) {
    if (b == 0) m.report("integer division by zero", n.pc, m.where(w, std::countr_zero(lanes)));
    return b == 0 ? a : static_cast<T>(Wide<T>(a) % Wide<T>(b));
  });
}
template <class T>
void minimum(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [&](T a, T b) { 
    const T x = a < b ? a : b;
    return n.has(kRelu) && x < T(0) ? T(0) : x;
  });
}
template <class T>
void maximum(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  binary<T>(m, w, n, lanes, [&](T a, T b) {
    const T x = a > b ? a : b;
    return n.has(kRelu) && x < T(0) ? T(0) : x;
  });
}
template <class T>
void absolute(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  unary<T>(m, w, n, lanes, [](T a) { return a < T(0) ? wrapped<T>(-(unsigned __int128)a) : a; });
}
template <class T>
void negate(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  unary<T>(m, w, n, lanes, [](T a) { return wrapped<T>(-(unsigned __int128)a); });
}
// |a - b| + c
template <class T>
void difference_sum(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  ternary<T>(m, w, n, lanes, [](T a, T b, T c) {
    return wrapped<T>((unsigned __int128)(a < b ? Wide<T>(b) - a : Wide<T>(a) - b) + c);
  });
}
// Products of 24-bit operands.
template <class T>
void multiply24(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const auto part = [](T x) { return static_cast<i64>(std::is_signed_v<T> ? T(u32(x) << 8) >> 8 : T(x & 0xffffff)); };
  const bool high = n.has(kHigh), sum = n.from.size() > 2;
  u64* d = m.target(w, n.to[0]);
  const u64 *a = m.source(w, n.from[0]), *b = m.source(w, n.from[1]), *c = m.source(w, n.from.back());
  each(lanes, [&](int l) {
    const i64 product = part(Number<T>::get(a[l])) * part(Number<T>::get(b[l]));
    d[l] = u32((high ? product >> 16 : product) + (sum ? i64(c[l]) : 0));
  });
}
// Four products of bytes, and a sum.
void dot_bytes(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const bool a_signed = n.type == Type::S32, b_signed = n.type2 == Type::S32;
  bitwise(m, w, n, lanes, [&](u64 a, u64 b, u64 c, u64) {
    i64 sum = static_cast<i64>(c);
    for (int i = 0; i < 32; i += 8) {
      const u8 x = u8(a >> i), y = u8(b >> i);
      sum += i64(a_signed ? i8(x) : x) * i64(b_signed ? i8(y) : y);
    }
    return static_cast<u64>(sum);
  });
}

// Of a template over the host type, the instance for an instruction's type.
#define PTX_FOR_TYPE(name) with_integer(n.type, [](auto x) -> Handler { return name<decltype(x)>; })

Handler product(const Instruction& n) {
  const bool sum = n.name == "mad";
  expect_plain(n, kWide | kHigh | kLow, sum ? 3 : 2);
  if (n.has(kWide)) return PTX_FOR_TYPE(multiply_wide);
  if (n.has(kHigh)) return sum ? PTX_FOR_TYPE(multiply_add_high) : PTX_FOR_TYPE(multiply_high);
  return sum ? PTX_FOR_TYPE(multiply_add_low) : PTX_FOR_TYPE(multiply_low);
}

Handler sum(const Instruction& n) {
  expect_plain(n, n.type == Type::S32 ? u32(kSat) : 0, 2);
  if (n.name == "add") return n.has(kSat) ? PTX_FOR_TYPE(add_saturated) : PTX_FOR_TYPE(add);
  return n.has(kSat) ? PTX_FOR_TYPE(subtract_saturated) : PTX_FOR_TYPE(subtract);
}

}  // namespace

Handler integer_handler(const Instruction& n) {
  if (n.name == "dp4a") {
    expect_plain(n, 0, 3);
    return dot_bytes;
  }
  if (!is_integer(n.type) || n.type2 != Type::None) return nullptr;
  const std::string& op = n.name;
  if (op == "add" || op == "sub") return sum(n);
  if (op == "mul" || op == "mad") return product(n);
  if (op == "mul24" || op == "mad24") {
    expect_plain(n, kHigh | kLow, op == "mul24" ? 2 : 3);
    return n.type == Type::S32 ? multiply24<i32> : multiply24<u32>;
  }
  if (op == "div" || op == "rem") {
    expect_plain(n, 0, 2);
    return op == "div" ? PTX_FOR_TYPE(divide) : PTX_FOR_TYPE(remainder);
  }
  if (op == "min" || op == "max") {
    expect_plain(n, kRelu, 2);
    return op == "min" ? PTX_FOR_TYPE(minimum) : PTX_FOR_TYPE(maximum);
  }
  if (op == "abs" || op == "neg") {
    expect_plain(n, 0, 1);
    return op == "abs" ? PTX_FOR_TYPE(absolute) : PTX_FOR_TYPE(negate);
  }
  if (op == "sad") {
    expect_plain(n, 0, 3);
    return PTX_FOR_TYPE(difference_sum);
  }
  return nullptr;
}

}  // namespace ptx
