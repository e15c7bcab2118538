// Moves, logic, shifts and bit fields.
#include "lanes.h"

namespace ptx {
namespace {

void move(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64, u64, u64) { return a; });
}
void unpack(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64* s = m.source(w, n.from[0]);
  const int bits = 8 * bytes_of(n.type) / static_cast<int>(n.to.size());
  each(lanes, [&](int l) {
    const u64 v = s[l];
    for (size_t i = 0; i < n.to.size(); ++i) m.target(w, n.to[i])[l] = (v >> (bits * i)) & mask_of(bits / 8);
  });
}
void pack(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const int bits = 8 * bytes_of(n.type) / static_cast<int>(n.from.size());
  each(lanes, [&](int l) {
    u64 v = 0;
    for (size_t i = 0; i < n.from.size(); ++i) v |= (m.source(w, n.from[i])[l] & mask_of(bits / 8)) << (bits * i);
    m.target(w, n.to[0])[l] = v;
  });
}

void bit_and(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64 b, u64, u64) { return a & b; });
}
void bit_or(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64 b, u64, u64) { return a | b; });
}
void bit_xor(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64 b, u64, u64) { return a ^ b; });
}
void bit_not(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64, u64, u64) { return ~a; });
}
void logical_not(Machine& m, Warp& w, const Instruction& n, u32 lanes) {  // cnot: 1 where a is 0
  const u64 mask = mask_of(bytes_of(n.type));
  bitwise(m, w, n, lanes, [&](u64 a, u64, u64, u64) { return u64((a & mask) == 0); });
}
void select(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const u64 negated = n.negated[2];
  bitwise(m, w, n, lanes, [&](u64 a, u64 b, u64 p, u64) { return (p & 1) != negated ? a : b; });
}
void look_up(Machine& m, Warp& w, const Instruction& n, u32 lanes) {  // lop3
  bitwise(m, w, n, lanes, [](u64 a, u64 b, u64 c, u64 table) {
    u64 r = 0;
    for (int i = 0; i < 8; ++i)
      if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
  });
}

// Shift counts are clamped at the width.
template <class T>
void shift_left(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  constexpr u32 width = 8 * sizeof(T);
  bitwise(m, w, n, lanes, [](u64 a, u64 b, u64, u64) { return u32(b) >= width ? 0 : a << u32(b); });
}
template <class T>
void shift_right(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  constexpr u32 width = 8 * sizeof(T);
  bitwise(m, w, n, lanes, [](u64 a, u64 b, u64, u64) {
    const T x = static_cast<T>(a);
    return u32(b) >= width ? u64(x < T(0) ? -1 : 0) : u64(x >> u32(b));
  });
}
void funnel(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const bool left = n.says("l"), wraps = n.says("wrap");
  bitwise(m, w, n, lanes, [&](u64 a, u64 b, u64 c, u64) {
    const u64 both = (b << 32) | u32(a);
    const u32 count = wraps ? u32(c) & 31 : std::min<u32>(u32(c), 32);
    return left ? (both << count) >> 32 : both >> count;
  });
}

template <class T>
void extract(Machine& m, Warp& w, const Instruction& n, u32 lanes) {  // bfe
  constexpr int width = 8 * sizeof(T);
  bitwise(m, w, n, lanes, [](u64 a, u64 b, u64 c, u64) -> u64 {
    const int position = b & 255, length = c & 255;
    if (!length) return 0;
    const i64 x = static_cast<i64>(static_cast<T>(a));  // sign-extended, or zero-extended
    const i64 shifted = position >= width ? (std::is_signed_v<T> && x < 0 ? -1 : 0)
                        : std::is_signed_v<T> ? x >> position : i64(u64(x) >> position);
    if (length >= width) return static_cast<u64>(shifted);
    const u64 top = static_cast<u64>(shifted) << (64 - length);
    return std::is_signed_v<T> ? u64(i64(top) >> (64 - length)) : top >> (64 - length);
  });
}
void insert(Machine& m, Warp& w, const Instruction& n, u32 lanes) {  // bfi
  bitwise(m, w, n, lanes, [](u64 a, u64 b, u64 c, u64 d) {
    const int position = c & 255, length = d & 255;
    if (position >= 64) return b;
    const u64 field = (length >= 64 ? ~0ull : (1ull << length) - 1) << position;
    return (b & ~field) | ((a << position) & field);
  });
}

// The bytes that prmt's modes select, as a selector of the default mode.
u32 selector_of(const Instruction& n, u64 c) {
  const u32 i = c & 3;
  const auto four = [](u32 a, u32 b, u32 x, u32 y) { return a | b << 4 | x << 8 | y << 12; };
  if (n.says("f4e")) return four(i, i + 1, i + 2, i + 3);
  if (n.says("b4e")) return four(i, (i + 7) & 7, (i + 6) & 7, (i + 5) & 7);
  if (n.says("rc8")) return four(i, i, i, i);
  if (n.says("ecl")) return four(i, std::max(i, 1u), std::max(i, 2u), 3);
  if (n.says("ecr")) return four(0, std::min(i, 1u), std::min(i, 2u), i);
  if (n.says("rc16")) return i & 1 ? four(2, 3, 2, 3) : four(0, 1, 0, 1);
  return static_cast<u32>(c);
}
void permute(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [&](u64 a, u64 b, u64 c, u64) {
    const u64 bytes = (b << 32) | u32(a);
    const u32 selector = selector_of(n, c);
    u64 r = 0;
    for (int i = 0; i < 4; ++i) {
      const u32 s = (selector >> (4 * i)) & 15;
      const u8 x = u8(bytes >> (8 * (s & 7)));
      r |= u64(s & 8 ? (x & 128 ? 255 : 0) : x) << (8 * i);
    }
    return r;
  });
}

template <class T>
void count_ones(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64, u64, u64) { return u64(std::popcount(T(a))); });
}
template <class T>
void leading_zeros(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  bitwise(m, w, n, lanes, [](u64 a, u64, u64, u64) { return u64(std::countl_zero(T(a))); });
}
void reverse(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const int bits = 8 * bytes_of(n.type);
  bitwise(m, w, n, lanes, [&](u64 a, u64, u64, u64) {
    u64 r = 0;
    for (int i = 0; i < bits; ++i) r |= (a >> i & 1) << (bits - 1 - i);
    return r;
  });
}
// The position of the highest bit that differs from the sign; its distance from there with .shiftamt.
template <class T>
void find_highest(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  using U = std::make_unsigned_t<T>;
  const int width = 8 * sizeof(T);
  const bool distance = n.says("shiftamt");
  u64* d = m.target(w, n.to[0]);
  const u64* a = m.source(w, n.from[0]);
  each(lanes, [&](int l) {
    const T x = static_cast<T>(a[l]);
    const int zeros = std::countl_zero(U(x < T(0) ? ~x : x));
    d[l] = zeros == width ? 0xffffffffu : u32(distance ? zeros : width - 1 - zeros);
  });
}
void bit_mask(Machine& m, Warp& w, const Instruction& n, u32 lanes) {  // bmsk
  const bool wraps = n.says("wrap");
  bitwise(m, w, n, lanes, [&](u64 a, u64 b, u64, u64) {
    const u32 position = wraps ? u32(a) & 31 : u32(a), length = wraps ? u32(b) & 31 : std::min<u32>(u32(b), 32);
    return position >= 32 ? 0 : ((1ull << length) - 1) << position;
  });
}

#define PTX_FOR_TYPE(name) with_integer(n.type, [](auto x) -> Handler { return name<decltype(x)>; })
#define PTX_FOR_WIDTH(name) (bytes_of(n.type) == 8 ? Handler(name<u64>) : Handler(name<u32>))

Handler moving(const Instruction& n) {
  if (!n.rest.empty() || n.flags || n.type == Type::B128) throw Unsupported("form of mov");
  if (n.to.size() > 1) return unpack;
  return n.from.size() > 1 ? pack : move;
}

struct Logic {
  const char* name;
  size_t operands;
  Handler handler;
};
constexpr Logic kLogic[] = {{"and", 2, bit_and}, {"or", 2, bit_or},   {"xor", 2, bit_xor},     {"not", 1, bit_not},
                            {"cnot", 1, logical_not}, {"lop3", 4, look_up}, {"bfi", 4, insert}, {"brev", 1, reverse}};

}  // namespace

Handler bits_handler(const Instruction& n) {
  const std::string& op = n.name;
  if (op == "mov") return moving(n);
  for (const Logic& logic : kLogic) {
    if (op != logic.name) continue;
    expect_plain(n, 0, logic.operands);
    return logic.handler;
  }
  if (op == "selp") {
    expect_plain(n, 0, 3);
    return select;
  }
  if (op == "shl" || op == "shr") {
    expect_plain(n, 0, 2);
    return op == "shl" ? PTX_FOR_TYPE(shift_left) : PTX_FOR_TYPE(shift_right);
  }
  if (op == "shf") {
    expect(n, 0, 3);
    return funnel;
  }
  if (op == "bfe") {
    expect_plain(n, 0, 3);
    return PTX_FOR_TYPE(extract);
  }
  if (op == "prmt") {
    expect(n, 0, 3);
    return permute;
  }
  if (op == "popc" || op == "clz") {
    expect_plain(n, 0, 1);
    return op == "popc" ? PTX_FOR_WIDTH(count_ones) : PTX_FOR_WIDTH(leading_zeros);
  }
  if (op == "bfind") {
    expect(n, 0, 1);
    return PTX_FOR_TYPE(find_highest);
  }
  if (op == "bmsk") {
    expect(n, 0, 2);
    return bit_mask;
  }
  return nullptr;
}

}  // namespace ptx
