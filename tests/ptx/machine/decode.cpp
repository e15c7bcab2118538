// What an opcode's modifiers say, and which handler executes it.
#include <sstream>

#include "program.h"

namespace ptx {
namespace {

const std::map<std::string, Type> kTypes = {
    {"pred", Type::Pred}, {"b8", Type::B8},       {"u8", Type::U8},         {"s8", Type::S8},       {"b16", Type::B16},
    {"u16", Type::U16},   {"s16", Type::S16},     {"b32", Type::B32},       {"u32", Type::U32},     {"s32", Type::S32},
    {"b64", Type::B64},   {"u64", Type::U64},     {"s64", Type::S64},       {"b128", Type::B128},   {"f16", Type::F16},
    {"bf16", Type::BF16}, {"f32", Type::F32},     {"f64", Type::F64},       {"f16x2", Type::F16x2},
    {"bf16x2", Type::BF16x2}, {"f32x2", Type::F32x2}};

const std::map<std::string, Compare> kCompares = {
    {"eq", Compare::Eq},   {"ne", Compare::Ne},   {"lt", Compare::Lt},   {"le", Compare::Le},   {"gt", Compare::Gt},
    {"ge", Compare::Ge},   {"equ", Compare::Equ}, {"neu", Compare::Neu}, {"ltu", Compare::Ltu}, {"leu", Compare::Leu},
    {"gtu", Compare::Gtu}, {"geu", Compare::Geu}, {"num", Compare::Num}, {"nan", Compare::Nan}, {"lo", Compare::Lt},
    {"ls", Compare::Le},   {"hi", Compare::Gt},   {"hs", Compare::Ge}};

const std::map<std::string, u32> kFlags = {
    {"ftz", kFtz},         {"sat", kSat},       {"approx", kApprox},   {"full", kFull},
    {"wide", kWide},       {"hi", kHigh},       {"lo", kLow},        {"NaN", kNanWins},     {"relu", kRelu},
    {"trans", kTranspose}, {"aligned", kAligned}, {"uni", kUniform}, {"nc", kNonCoherent},
    {"volatile", kStrong | kVolatile}, {"relaxed", kStrong | kRelaxed}, {"acquire", kStrong | kAcquire},
    {"release", kStrong | kRelease}, {"acq_rel", kStrong | kAcquire | kRelease}, {"cta", kBlockScope},
    {"sc", kStrong | kAcquire | kRelease}};

const std::map<std::string, std::pair<Round, u32>> kRounds = {
    {"rn", {Round::Nearest, 0}}, {"rz", {Round::Zero, 0}}, {"rm", {Round::Down, 0}}, {"rp", {Round::Up, 0}},
    {"rna", {Round::Away, 0}}, {"rni", {Round::Nearest, kToInteger}}, {"rzi", {Round::Zero, kToInteger}},
    {"rmi", {Round::Down, kToInteger}}, {"rpi", {Round::Up, kToInteger}}};

const std::map<std::string, std::pair<Space, u32>> kSpaces = {
    {"global", {Space::Global, 0}}, {"shared", {Space::Shared, 0}}, {"shared::cta", {Space::Shared, 0}},
    {"shared::cluster", {Space::Shared, kClusterWindow}}, {"local", {Space::Local, 0}}, {"param", {Space::Param, 0}},
    {"param::entry", {Space::Param, 0}}, {"const", {Space::Const, 0}}};

// Hints and scopes that change nothing here.
bool without_effect(const std::string& m) {
  static const char* const words[] = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "gpu", "sys", "cluster"};
  for (const char* w : words)
    if (m == w) return true;
  return m.rfind("L1::", 0) == 0 || m.rfind("L2::", 0) == 0 || m == "level::eviction_priority";
}
bool touches_memory(const std::string& name) {
  static const char* const names[] = {"ld", "ldu", "st", "atom", "red", "prefetch", "discard", "applypriority"};
  for (const char* n : names)
    if (name == n) return true;
  return false;
}

void modifier(Instruction& n, const std::string& m) {
  const bool compares = n.name == "setp" || n.name == "set";
  if (const auto t = kTypes.find(m); t != kTypes.end() && n.type2 == Type::None) {
    (n.type == Type::None ? n.type : n.type2) = t->second;
  } else if (const auto c = kCompares.find(m); compares && c != kCompares.end()) {
    n.compare = c->second;
  } else if (compares && (m == "and" || m == "or" || m == "xor")) {
    n.combine = m == "and" ? Combine::And : m == "or" ? Combine::Or : Combine::Xor;
  } else if (const auto r = kRounds.find(m); r != kRounds.end()) {
    n.round = r->second.first;
    n.flags |= r->second.second;
  } else if (const auto s = kSpaces.find(m); s != kSpaces.end()) {
    (n.space == Space::Generic ? n.space : n.space2) = s->second.first;
    n.flags |= s->second.second;
  } else if (const auto f = kFlags.find(m); f != kFlags.end()) {
    n.flags |= f->second;
  } else if (m == "L2::cache_hint") {
    n.rest += ".cache_hint";
  } else if (!(touches_memory(n.name) && without_effect(m))) {
    n.rest += "." + m;
  }
}

// A vector's width, "v4" or "x4".
bool width(Instruction& n, const std::string& m) {
  const bool matrix = n.name == "ldmatrix" || n.name == "stmatrix";
  if (m.size() != 2 || m[0] != (matrix ? 'x' : 'v') || !std::isdigit(static_cast<unsigned char>(m[1]))) return false;
  n.vector = static_cast<u8>(m[1] - '0');
  return true;
}

Kind kind_of(const Instruction& n) {
  if (n.name == "bra") return Kind::Branch;
  if (n.name == "ret" || n.name == "exit") return Kind::Exit;
  if (n.name == "nanosleep") return Kind::Sleep;
  if (n.says("cluster") && n.name == "barrier") return n.says("arrive") ? Kind::ClusterArrive : Kind::ClusterWait;
  if ((n.name == "bar" || n.name == "barrier") && !n.says("warp")) return Kind::BlockBarrier;
  return Kind::Plain;
}

}  // namespace

void decode(Instruction& n, const std::string& opcode) {
  std::istringstream words(opcode);
  std::string m;
  std::getline(words, n.name, '.');
  while (std::getline(words, m, '.'))
    if (!width(n, m)) modifier(n, m);
  n.kind = kind_of(n);
  // shfl, vote, match, redux, elect and bar.warp name their members; the others want the whole warp.
  static const char* const named[] = {"shfl", "vote", "match", "redux", "elect"};
  for (const char* name : named) n.member_mask |= n.name == name;
  n.member_mask |= n.name == "bar" && n.says("warp");
  const bool whole = n.name == "ldmatrix" || n.name == "stmatrix" || n.name == "movmatrix";
  n.together = n.member_mask || whole || (n.kind == Kind::BlockBarrier && (n.name == "bar" || n.has(kAligned))) ||
               n.kind == Kind::ClusterArrive || n.kind == Kind::ClusterWait;
  if (n.kind == Kind::Plain && n.together) n.kind = Kind::Together;
}

void choose_handler(Instruction& n) {
  static constexpr Handler (*families[])(const Instruction&) = {
      integer_handler, bits_handler, float_handler, approximate_handler, convert_handler, compare_handler,
      memory_handler, atomic_handler, address_handler, bulk_handler, copy_handler, mbarrier_handler, warp_handler,
      control_handler};
  if (n.kind != Kind::Plain && n.kind != Kind::Together) return;  // the scheduler's own
  try {
    for (const auto family : families)
      if ((n.run = family(n))) return;
    n.unsupported = "no such instruction";
  } catch (const Unsupported& u) {
    n.unsupported = u.what();
  }
}

}  // namespace ptx
