// atom and red, in global and shared memory, on single values and on vectors.
#include <cstring>

#include "atomics.h"
#include "lanes.h"

namespace ptx {
namespace {

template <class T>
u64 on_integers(const std::string& op, u64 old, u64 x) {
  const T a = Number<T>::get(old), b = Number<T>::get(x);
  if (op == "add") return Number<T>::put(static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + b));
  if (op == "min") return Number<T>::put(a < b ? a : b);
  if (op == "max") return Number<T>::put(a > b ? a : b);
  if (op == "inc") return Number<T>::put(a >= b ? T(0) : static_cast<T>(a + 1));
  if (op == "dec") return Number<T>::put(a == T(0) || a > b ? b : static_cast<T>(a - 1));
  if (op == "and") return old & x;
  if (op == "or") return old | x;
  if (op == "xor") return old ^ x;
  if (op == "exch") return x & mask_of(sizeof(T));
  throw Unsupported("atomic operation " + op);
}
template <class T>
u64 on_floats(const std::string& op, u64 old, u64 x) {
  const auto a = Number<T>::get(old), b = Number<T>::get(x);
  if (op == "min") return Number<T>::put(smaller(a, b, false));
  if (op == "max") return Number<T>::put(larger(a, b, false));
  if (op != "add") throw Unsupported("atomic operation " + op);
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) return Number<T>::put(a + b);
  return Number<T>::put(static_cast<double>(rounded(odd_sum(a, b), Number<T>::format, Round::Nearest)));
}

}  // namespace

u64 atomic_result(const std::string& op, Type type, u64 old, u64 x) {
  if (type == Type::F16x2 || type == Type::BF16x2) {
    const Type half = type == Type::F16x2 ? Type::F16 : Type::BF16;
    return atomic_result(op, half, old & 0xffff, x & 0xffff) | atomic_result(op, half, old >> 16, x >> 16) << 16;
  }
  if (is_float(type)) return with_float(type, [&](auto t) { return on_floats<decltype(t)>(op, old, x); });
  return with_integer(type, [&](auto t) { return on_integers<decltype(t)>(op, old, x); });
}

namespace {

const char* const kOperations[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"};

std::string operation(const Instruction& n) {
  for (const char* op : kOperations)
    if (n.says(op)) return op;
  throw Unsupported("atomic operation " + n.rest);
}

// One lane's access: checks, the order through memory, and the new value.
void one(Machine& m, Warp& w, const Instruction& n, const std::string& op, int l, u64 address, int element) {
  Machine::Place p;
  const int size = bytes_of(n.type);
  if (!m.locate(w, l, n, n.space, address, p) || !m.within(w, l, n, p, size, "atomic")) return;
  if (p.space != Space::Global && p.space != Space::Shared) throw Unsupported("space of an atomic");
  u8* at = m.bytes_at(w, l, p);
  m.release(w, reinterpret_cast<u64>(at), n.has(kRelease));
  m.acquire(w, reinterpret_cast<u64>(at), n.has(kAcquire));
  u64 old = 0;
  std::memcpy(&old, at, size);
  const u64 x = m.source(w, n.from[element])[l];
  const u64 mask = mask_of(size);
  const bool keeps = op == "cas" && old != (x & mask);
  const u64 y = op != "cas" ? atomic_result(op, n.type, old, x) : keeps ? old : m.source(w, n.from[1])[l] & mask;
  check_atomic(m, w, l, n, p, size, y == old);
  std::memcpy(at, &y, size);
  if (y != old) m.make_progress();
  if (!n.to.empty()) m.target(w, n.to[element])[l] = old;
}

void run(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  const std::string op = operation(n);
  const u64* base = m.source(w, n.at[0].base);
  u64 addresses[kLanes];
  each(lanes, [&](int l) { addresses[l] = base[l] + n.at[0].offset; });
  each(lanes, [&](int l) {
    for (int v = 0; v < n.vector; ++v) one(m, w, n, op, l, addresses[l] + v * bytes_of(n.type), v);
  });
  if (m.launch.count && n.space == Space::Global)
    count_global(m.counters[n.pc], lanes, addresses, bytes_of(n.type) * n.vector);
  m.poll(w, n.pc);
}

}  // namespace

void check_atomic(Machine& m, Warp& w, int lane, const Instruction& n, const Machine::Place& p, int size, bool same) {
  Shadow* shadow = m.shadow_of(p);
  if (!shadow) return;
  const bool shared = p.space == Space::Shared;
  const u64 first = shared ? p.address : p.address - m.allocation_of(p.address, 1)->begin;
  Machine::Access a{&w, lane, n.pc, true, false, true, shared ? "shared" : "global", p.address};
  shadow->each(first, size, [&](Cell& c, size_t, int) {
    if (shared && !(c.flags & kWritten)) m.report("uninitialised shared read", n.pc, m.where(w, lane));
    if (c.flags & kBarrierObject) m.report("plain access to an mbarrier", n.pc, m.where(w, lane));
    if (m.launch.races) m.touch(c, a, same && (c.flags & kStrongWrite));
  });
}

Handler atomic_handler(const Instruction& n) {
  if ((n.name != "atom" && n.name != "red") || n.says("async")) return nullptr;
  const std::string op = operation(n);
  const size_t values = op == "cas" ? 2 : n.vector;
  if (n.from.size() != values + (n.says("cache_hint") ? 1 : 0)) throw Unsupported("number of operands");
  return run;
}

}  // namespace ptx
