#include "numbers.h"

#include <algorithm>
#include <limits>

namespace ptx {

long double to_integer(long double x, Round round) {
  switch (round) {
    case Round::Zero: return std::trunc(x);
    case Round::Down: return std::floor(x);
    case Round::Up: return std::ceil(x);
    case Round::Away: return std::round(x);
    default: return std::nearbyint(x);
  }
}

long double rounded(long double x, const Format& format, Round round) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - 1, format.lowest) - (format.bits - 1);
  const long double y = std::ldexp(to_integer(std::ldexp(x, -unit), round), unit);
  const long double most = std::ldexp(2.0L - std::ldexp(1.0L, 1 - format.bits), format.highest);
  if (std::fabs(y) <= most) return y == 0 ? std::copysign(0.0L, x) : y;
  const bool stays = round == Round::Zero || (round == Round::Down && x > 0) || (round == Round::Up && x < 0);
  return std::copysign(stays ? most : std::numeric_limits<long double>::infinity(), x);
}

namespace {

// Sign, exponent and fraction of a number that the format holds exactly.
u16 encoded(double x, const Format& format) {
  const u16 sign = std::signbit(x) ? 0x8000 : 0;
  const int fraction = format.bits - 1;
  const double a = std::fabs(x);
  if (a == 0) return sign;
  if (std::isinf(a)) return sign | u16((2 * format.highest + 1) << fraction);
  int exponent;
  const double m = std::frexp(a, &exponent);
  if (exponent - 1 < format.lowest) return sign | u16(std::ldexp(a, fraction - format.lowest));
  return sign | u16((exponent - 1 + format.highest) << fraction) | u16(std::ldexp(2 * m - 1, fraction));
}

bool odd(double x) { return std::bit_cast<u64>(x) & 1; }

double to_odd(double r, double rest) {
  if (rest == 0 || !std::isfinite(r) || odd(r)) return r;
  return std::nextafter(r, rest > 0 ? INFINITY : -INFINITY);
}

}  // namespace

float from_half(u16 bits) {
  const u32 sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float small = std::ldexp(static_cast<float>(fraction), -24);
  return sign ? -small : small;
}
u16 to_half(double x, Round round) { return x != x ? kNan16 : encoded(double(rounded(x, kHalf, round)), kHalf); }
u16 to_brain(double x, Round round) {
  const float single = static_cast<float>(x);
  if (round == Round::Nearest && static_cast<double>(single) == x) return brain_of(single);
  return x != x ? kNan16 : encoded(double(rounded(x, kBrain, round)), kBrain);
}

double odd_sum(double a, double b) {
  const double s = a + b, from_b = s - a, rest = (a - (s - from_b)) + (b - from_b);
  return to_odd(s, std::isfinite(s) ? rest : 0);
}
double odd_quotient(double a, double b) {
  const double q = a / b;
  if (!std::isfinite(q) || q == 0 || std::isinf(b)) return q;
  const double rest = std::fma(-q, b, a);
  return to_odd(q, std::signbit(b) ? -rest : rest);
}
double odd_root(double a) {
  const double r = std::sqrt(a);
  return r == 0 || !std::isfinite(r) ? r : to_odd(r, std::fma(-r, r, a));
}

}  // namespace ptx
