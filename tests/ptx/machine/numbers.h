// Arithmetic on the bits of PTX's number formats, every rounding mode in one rounding.
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include "types.h"

namespace ptx {

enum class Round : u8 { None, Nearest, Zero, Down, Up, Away };  // Away: ties go away from zero (.rna)

constexpr u32 kNan32 = 0x7fffffffu;  // the canonical NaNs
constexpr u16 kNan16 = 0x7fffu;

// Precision and exponents of a binary format.
struct Format {
  int bits, lowest, highest;  // significant bits, exponents of the smallest normal and of the largest number
};
constexpr Format kHalf{11, -14, 15}, kBrain{8, -126, 127}, kSingle{24, -126, 127}, kDouble{53, -1022, 1023};

// `x` rounded to a format; exact as a long double. What overflows becomes infinite, or the largest number where the
// direction says so.
long double rounded(long double x, const Format& format, Round round);
long double to_integer(long double x, Round round);

float from_half(u16 bits);
u16 to_half(double x, Round round = Round::Nearest);
inline float from_brain(u16 bits) { return std::bit_cast<float>(u32(bits) << 16); }
u16 to_brain(double x, Round round = Round::Nearest);
// The nearest bfloat16 of a float, quickly.
inline u16 brain_of(float x) {
  const u32 bits = std::bit_cast<u32>(x);
  return x != x ? kNan16 : u16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// In double precision, rounded to odd: a second rounding to fewer bits is then correct in any mode.
double odd_sum(double a, double b);
double odd_quotient(double a, double b);
double odd_root(double a);

struct Half {};
struct Brain {};

// How a register holds a T, and the host type C in which it is computed with.
template <class T>
struct Number {
  using C = T;
  static C get(u64 v) { return static_cast<T>(v); }
  static u64 put(C x) { return static_cast<std::make_unsigned_t<T>>(x); }
};
template <>
struct Number<float> {
  using C = float;
  static constexpr Format format = kSingle;
  static float get(u64 v) { return std::bit_cast<float>(static_cast<u32>(v)); }
  static u64 put(float x) { return x != x ? kNan32 : std::bit_cast<u32>(x); }
};
template <>
struct Number<double> {
  using C = double;
  static constexpr Format format = kDouble;
  static double get(u64 v) { return std::bit_cast<double>(v); }
  static u64 put(double x) { return x != x ? 0x7fffffffffffffffull : std::bit_cast<u64>(x); }
};
template <>
struct Number<Half> {
  using C = double;
  static constexpr Format format = kHalf;
  static double get(u64 v) { return from_half(static_cast<u16>(v)); }
  static u64 put(double x) { return to_half(x); }
};
template <>
struct Number<Brain> {
  using C = double;
  static constexpr Format format = kBrain;
  static double get(u64 v) { return from_brain(static_cast<u16>(v)); }
  static u64 put(double x) { return to_brain(x); }
};

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
template <class C>
C flushed(C x, bool ftz) {
  if constexpr (std::is_same_v<C, float>) return ftz ? flush(x) : x;
  return x;
}
template <class C>
C saturated(C x) {
  return x > C(1) ? C(1) : x > C(0) ? x : C(0);  // a NaN gives 0
}

// minNum and maxNum with -0 below +0; with `nan`, a NaN operand gives NaN.
template <class C>
C smaller(C a, C b, bool nan) {
  if (a != a || b != b) return nan || (a != a && b != b) ? C(NAN) : a != a ? b : a;
  if (a == 0 && b == 0) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class C>
C larger(C a, C b, bool nan) {
  return -smaller(C(-a), C(-b), nan);
}

// Calls f with a value of the host type that holds `t`, or with a format's tag.
template <class F>
auto with_integer(Type t, F&& f) {
  switch (t) {
    case Type::B8: case Type::U8: return f(u8{});
    case Type::S8: return f(i8{});
    case Type::B16: case Type::U16: return f(u16{});
    case Type::S16: return f(i16{});
    case Type::B32: case Type::U32: return f(u32{});
    case Type::S32: return f(i32{});
    case Type::B64: case Type::U64: return f(u64{});
    case Type::S64: return f(i64{});
    default: throw Unsupported("integer type");
  }
}
template <class F>
auto with_float(Type t, F&& f) {
  switch (t) {
    case Type::F16: return f(Half{});
    case Type::BF16: return f(Brain{});
    case Type::F32: return f(float{});
    case Type::F64: return f(double{});
    default: throw Unsupported("floating-point type");
  }
}

}  // namespace ptx
