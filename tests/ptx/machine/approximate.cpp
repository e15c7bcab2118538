// Approximate instructions. Correctly rounded by default; with `perturb` off by a random part of their documented
// bound, so that a kernel which needs more than is promised shows. div.approx and div.full are a * (1 / b), rounded
// twice, as the PTX manual says. What is exact on every GPU stays exact: 2^0, lg2(1), reciprocals of powers of two.
#include "lanes.h"

namespace ptx {

namespace {

u64 hashed(u64 x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
// The float nearest to y + error, an error within +-bound; never further from y than the bound. Equal operands have
// equal errors, as on a GPU: lanes that compute the same must get the same.
float off_by(Machine& m, double y, double bound) {
  if (!m.launch.perturb || !std::isfinite(y)) return static_cast<float>(y);
  const double share = static_cast<double>(hashed(std::bit_cast<u64>(y) ^ m.launch.seed) % 2001) / 1000 - 1;
  const float f = static_cast<float>(y + share * bound);
  return std::fabs(f - y) <= bound ? f : std::nextafterf(f, static_cast<float>(y));
}
double last_place(double y) {
  const float f = std::fabs(static_cast<float>(y));
  return static_cast<double>(std::nextafterf(f, INFINITY)) - f;
}
bool power_of_two(double x) {
  int exponent;
  return std::fabs(std::frexp(x, &exponent)) == 0.5;
}
// x, or the number next to the exact result that is not too many units of the last place away.
float within(float x, double exact, int units) {
  const double bound = units * last_place(exact);
  return std::isfinite(x) && std::fabs(x - exact) > bound ? std::nextafterf(x, static_cast<float>(exact)) : x;
}
bool half_wide(const Instruction& n) { return n.type != Type::F32 && n.type != Type::F64; }

template <class F>
void on_floats(Machine& m, Warp& w, const Instruction& n, u32 lanes, F&& f) {
  const bool ftz = n.has(kFtz);
  unary<float>(m, w, n, lanes, [&](float x) { return flushed(static_cast<float>(f(flushed(x, ftz))), ftz); });
}

void divide(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const bool ftz = n.has(kFtz), full = n.has(kFull);
  binary<float>(m, w, n, lanes, [&](float x, float y) {
    const float a = flushed(x, ftz), b = flushed(y, ftz);
    float inverse = 1.0f / b;
    if (full && !std::isnormal(inverse)) return flushed(a / b, ftz);  // .full scales its operands there
    if (!power_of_two(b)) inverse = off_by(m, 1.0 / b, last_place(inverse));
    const float quotient = a * flush(inverse);  // 0 for |b| above 2^126
    return flushed(m.launch.perturb && inverse ? within(quotient, double(a) / b, 2) : quotient, ftz);
  });
}
void reciprocal(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  on_floats(m, w, n, lanes, [&](float x) { 
    const double y = 1.0 / x;
    return power_of_two(x) ? static_cast<float>(y) : off_by(m, y, last_place(y));
  });
}
void root(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  on_floats(m, w, n, lanes, [&](float x) {
    const double y = std::sqrt(double(x));
    return off_by(m, y, std::ldexp(y, -23));
  });
}
void inverse_root(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  on_floats(m, w, n, lanes, [&](float x) {
    const double y = 1 / std::sqrt(double(x));
    return off_by(m, y, y * std::exp2(-22.9));
  });
}
void power(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  on_floats(m, w, n, lanes, [&](float x) {
    const double y = std::exp2(double(x));
    return x == 0 ? 1.0f : off_by(m, y, 2 * last_place(y));
  });
}
void logarithm(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  on_floats(m, w, n, lanes, [&](float x) {
    const double y = std::log2(double(x));
    if (x == 1) return 0.0f;
    return off_by(m, y, std::ldexp(x > 0.5f && x < 2 ? 1.0 : std::fabs(y), -22));
  });
}
void sine(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  on_floats(m, w, n, lanes, [&](float x) { return off_by(m, std::sin(double(x)), std::exp2(-20.5)); });
}
void cosine(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  on_floats(m, w, n, lanes, [&](float x) { return off_by(m, std::cos(double(x)), std::exp2(-20.5)); });
}
void hyperbolic_tangent(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  on_floats(m, w, n, lanes, [&](float x) {
    const double y = std::tanh(double(x));
    return off_by(m, y, std::ldexp(std::fabs(y), -11));
  });
}

// ex2 and tanh in half precision, of one value or a pair.
template <class T>
void on_halves(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const auto f = [&](double x) { return n.name == "ex2" ? std::exp2(x) : std::tanh(x); };
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  const bool pair = is_pair(n.type);
  each(lanes, [&](int l) {
    const u64 low = Number<T>::put(f(Number<T>::get(a[l])));
    d[l] = pair ? low | Number<T>::put(f(Number<T>::get(a[l] >> 16))) << 16 : low;
  });
}

// In double precision only the upper half of the result is defined.
u64 upper_half(double x) { return Number<double>::put(x) & 0xffffffff00000000ull; }
void reciprocal_double(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64, u64, u64) { return upper_half(1 / Number<double>::get(a)); });
}
void inverse_root_double(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64, u64, u64) { return upper_half(1 / std::sqrt(Number<double>::get(a))); });
}

struct Approximation {
  const char* name;
  Handler handler;
};
constexpr Approximation kUnary[] = {{"rcp", reciprocal}, {"sqrt", root},  {"rsqrt", inverse_root},
                                    {"ex2", power},      {"lg2", logarithm}, {"sin", sine},
                                    {"cos", cosine},     {"tanh", hyperbolic_tangent}};

}  // namespace

Handler approximate_handler(const Instruction& n) {
  if (n.name == "div" && n.type == Type::F32 && (n.has(kApprox) || n.has(kFull))) {
    expect_plain(n, kApprox | kFull | kFtz, 2);
    return divide;
  }
  for (const Approximation& x : kUnary) {
    if (n.name != x.name) continue;
    expect_plain(n, kApprox | kFtz, 1);
    if (!n.has(kApprox)) throw Unsupported("an exact form");
    if (n.type == Type::F32) return x.handler;
    if (n.type == Type::F64 && n.name == "rcp") return reciprocal_double;
    if (n.type == Type::F64 && n.name == "rsqrt") return inverse_root_double;
    if (!half_wide(n) || (n.name != "ex2" && n.name != "tanh")) throw Unsupported("type");
    return n.type == Type::F16 || n.type == Type::F16x2 ? on_halves<Half> : on_halves<Brain>;
  }
  return nullptr;
}

}  // namespace ptx
