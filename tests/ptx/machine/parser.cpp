// Modules, variables, entries and operands. What an instruction means is decode.cpp's.
#include <algorithm>
#include <cctype>
#include <set>

#include "lexer.h"
#include "program.h"

namespace ptx {
namespace {

const std::map<std::string, Type> kVariableTypes = {
    {".pred", Type::Pred}, {".b8", Type::B8},   {".u8", Type::U8},   {".s8", Type::S8},   {".b16", Type::B16},
    {".u16", Type::U16},   {".s16", Type::S16}, {".b32", Type::B32}, {".u32", Type::U32}, {".s32", Type::S32},
    {".b64", Type::B64},   {".u64", Type::U64}, {".s64", Type::S64}, {".f16", Type::F16}, {".bf16", Type::BF16},
    {".f32", Type::F32},   {".f64", Type::F64}, {".b128", Type::B128}};

const char* const kSpecials[] = {"%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid", "%nwarpid", "%smid",
                                 "%nsmid", "%cluster", "%is_explicit", "%ncluster", "%lanemask", "%clock",
                                 "%globaltimer", "%dynamic_smem", "%total_smem", "%gridid"};

bool is_special(const std::string& s) {
  return std::any_of(std::begin(kSpecials), std::end(kSpecials), [&](const char* p) { return s.rfind(p, 0) == 0; });
}
int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// Opcodes that write no register.
const std::set<std::string> kNoResult = {
    "st", "red", "stmatrix", "cp", "prefetch", "prefetchu", "discard", "applypriority", "bar", "barrier", "membar",
    "fence", "nanosleep", "ret", "exit", "trap", "brkpt", "griddepcontrol", "setmaxnreg", "pmevent"};

class Parser {
 public:
  Parser(const std::string& source, Module& module) : source_(source), tokens_(tokens_of(source)), module_(module) {}

  void run() {
    while (at_ < tokens_.size()) {
      const std::string s = next();
      if (s == ".version" || s == ".address_size") next();
      else if (s == ".target") names();
      else if (s == ".file") file();
      else if (s == ".visible" || s == ".weak" || s == ".common" || s == ";") continue;
      else if (s == ".extern") external();
      else if (s == ".entry") entry();
      else if (s == ".global" || s == ".shared" || s == ".const") variable(s);
      else if (s == ".section") section();
      else if (s == ".loc") location();
      else if (s == ".func") throw ParseError("functions with a body are not supported");
      else throw ParseError("not known at module level: " + s);
    }
  }

 private:
  const std::string& source_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  Module& module_;
  Entry* entry_ = nullptr;
  std::map<std::string, int> registers_, labels_;
  std::map<std::string, Variable> locals_;
  std::map<u64, int> constants_;
  std::vector<std::pair<int, std::string>> branches_;
  int file_ = 0, line_ = 0;

  const std::string& peek(size_t ahead = 0) const {
    static const std::string end;
    return at_ + ahead < tokens_.size() ? tokens_[at_ + ahead].text : end;
  }
  std::string next() {
    if (at_ >= tokens_.size()) throw ParseError("unexpected end");
    return tokens_[at_++].text;
  }
  bool eat(const std::string& s) {
    if (peek() != s) return false;
    ++at_;
    return true;
  }
  void need(const std::string& s) {
    if (!eat(s)) throw ParseError("expected '" + s + "', got '" + peek() + "' in " + (entry_ ? entry_->name : "module"));
  }
  void skip_past(const std::string& s) {
    while (next() != s) {}
  }
  int number() { return static_cast<int>(std::stoll(next(), nullptr, 0)); }

  // ---- directives ---------------------------------------------------------------------------------------------------
  void names() {
    do next();
    while (eat(","));
  }
  void file() {
    const int index = number();
    const std::string quoted = next();
    module_.files[index] = quoted.substr(1, quoted.size() - 2);
    while (eat(",")) next();
  }
  void section() {
    skip_past("{");
    for (int depth = 1; depth;) {
      const std::string s = next();
      depth += (s == "{") - (s == "}");
    }
  }
  void external() {
    if (peek() == ".func") skip_past(";");  // declared only: a call of it is not supported
  }
  void location() {
    file_ = number(), line_ = number();
    next();
    while (eat(",")) {
      const std::string s = next();
      if (s == "function_name") {
        next();
        if (eat("+")) next();
      } else {  // inlined_at, file, line, column
        next(), next(), next();
      }
    }
  }

  // ---- variables and parameters -------------------------------------------------------------------------------------
  struct Declared {
    std::string name;
    Type type = Type::None;
    int align = 1, count = 1;
    bool open = false;  // an array without a size
    int bytes() const { return bytes_of(type) * count; }
  };
  Declared declared() {
    Declared d;
    for (d.name = next(); d.name[0] == '.'; d.name = next()) {
      if (d.name == ".align") d.align = std::max(d.align, number());
      else if (d.name == ".ptr") pointer_attributes();
      else if (const auto t = kVariableTypes.find(d.name); t != kVariableTypes.end()) d.type = t->second;
    }
    while (eat("[")) {
      if (eat("]")) {
        d.open = true;
        continue;
      }
      d.count *= number();
      need("]");
    }
    d.align = std::max(d.align, bytes_of(d.type));
    return d;
  }
  void pointer_attributes() {  // they describe what is pointed at
    static const std::set<std::string> spaces = {".global", ".shared", ".const", ".local"};
    for (;;) {
      if (spaces.count(peek())) next();
      else if (peek() == ".align") next(), next();
      else return;
    }
  }
  std::vector<u8> initial_values(Type type) {
    std::vector<u8> bytes;
    const bool list = eat("{");
    do {
      const bool negative = eat("-");
      u64 x = std::stoull(next(), nullptr, 0);
      if (negative) x = 0 - x;
      for (int b = 0; b < bytes_of(type); ++b) bytes.push_back(static_cast<u8>(x >> (8 * b)));
    } while (list && eat(","));
    if (list) need("}");
    return bytes;
  }
  void variable(const std::string& space) {
    const Declared d = declared();
    const std::vector<u8> initial = eat("=") ? initial_values(d.type) : std::vector<u8>();
    need(";");
    if (space == ".shared") {
      auto& table = entry_ ? locals_ : module_.globals;
      if (d.open) {
        table[d.name] = {Space::Shared, -1};  // dynamic memory, after the static
        return;
      }
      if (!entry_) throw ParseError("static shared memory at module level: " + d.name);
      const int offset = round_up(entry_->shared_bytes, d.align);
      table[d.name] = {Space::Shared, offset};
      entry_->shared_bytes = offset + d.bytes();
    } else if (space == ".local") {
      const int offset = round_up(entry_->local_bytes, d.align);
      locals_[d.name] = {Space::Local, offset};
      entry_->local_bytes = offset + d.bytes();
    } else {
      module_.storage.emplace_back(d.bytes() + 16, u8(0));
      auto& storage = module_.storage.back();
      std::copy(initial.begin(), initial.end(), storage.begin());
      const u64 address = reinterpret_cast<u64>(storage.data());
      module_.globals[d.name] = {Space::Global, static_cast<i64>(address)};
      module_.storage_ranges.push_back({address, address + d.bytes()});
    }
  }
  void parameters() {
    if (!eat("(")) return;
    while (!eat(")")) {
      need(".param");
      const Declared d = declared();
      const int offset = round_up(entry_->parameter_bytes, d.align);
      entry_->parameters.push_back({d.name, offset, d.bytes()});
      locals_[d.name] = {Space::Param, offset};
      entry_->parameter_bytes = offset + d.bytes();
      eat(",");
    }
  }
  void entry_attributes() {
    while (!eat("{")) {
      const std::string s = next();
      if (s != ".reqntid" && s != ".maxntid") continue;
      entry_->exact_threads = s == ".reqntid";
      entry_->most_threads = number();
      while (eat(",")) entry_->most_threads *= number();
    }
  }

  // ---- entries ------------------------------------------------------------------------------------------------------
  void entry() {
    auto own = std::make_unique<Entry>();
    entry_ = own.get();
    entry_->name = next();
    registers_.clear(), labels_.clear(), locals_.clear(), constants_.clear(), branches_.clear();
    parameters();
    entry_attributes();
    for (int depth = 1; depth;) {
      if (eat("{")) ++depth;
      else if (eat("}")) --depth;
      else if (!eat(";")) statement();
    }
    append_return();
    for (const auto& [pc, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw ParseError("no such label: " + label);
      entry_->code[pc].target = found->second;
    }
    entry_->registers = static_cast<int>(registers_.size());
    module_.entries[entry_->name] = std::move(own);
    entry_ = nullptr;
  }
  void append_return() {
    Instruction last;
    last.pc = static_cast<int>(entry_->code.size());
    last.text = "(end of the entry)";
    decode(last, "ret");
    choose_handler(last);
    entry_->code.push_back(last);
  }
  void statement() {
    const std::string s = peek();
    if (s == ".reg") return register_declaration();
    if (s == ".loc") return next(), location();
    if (s == ".pragma") return skip_past(";");
    if (s == ".local" || s == ".shared") return next(), variable(s);
    if (s[0] == '.') throw ParseError("directive " + s + " in " + entry_->name);
    if (peek(1) == ":") {
      labels_[s] = static_cast<int>(entry_->code.size());
      at_ += 2;
      return;
    }
    instruction();
  }
  void register_declaration() {
    next(), next();
    do {
      const std::string name = next();
      if (!eat("<")) {
        register_of(name);
        continue;
      }
      const int count = number();
      need(">");
      for (int i = 0; i < count; ++i) register_of(name + std::to_string(i));
    } while (eat(","));
    need(";");
  }

  // ---- operands -----------------------------------------------------------------------------------------------------
  int register_of(const std::string& name) {
    return registers_.emplace(name, static_cast<int>(registers_.size())).first->second;
  }
  int known_register(const std::string& name) {
    const auto found = registers_.find(name);
    if (found == registers_.end()) throw ParseError("no such register or symbol: " + name);
    return found->second;
  }
  int constant(u64 value) {
    const auto [found, fresh] = constants_.emplace(value, static_cast<int>(constants_.size()));
    if (fresh) entry_->constants.insert(entry_->constants.end(), kLanes, value);
    return ~found->second;
  }
  u64 literal(std::string s, bool negative) {
    const char kind = s.size() > 1 ? static_cast<char>(std::tolower(s[1])) : ' ';
    if (s[0] == '0' && kind == 'f') return u32(std::stoull(s.substr(2), nullptr, 16)) ^ (negative ? 1u << 31 : 0);
    if (s[0] == '0' && kind == 'd') return std::stoull(s.substr(2), nullptr, 16) ^ (negative ? 1ull << 63 : 0);
    if (s.back() == 'U') s.pop_back();
    if (s.find('.') != std::string::npos) throw ParseError("decimal floating-point literal " + s);
    const u64 x = kind == 'b' ? std::stoull(s.substr(2), nullptr, 2) : std::stoull(s, nullptr, 0);
    return negative ? 0 - x : x;
  }
  int operand() {
    const bool negative = eat("-");
    const std::string s = next();
    if (s == "_") return kSink;
    if (std::isdigit(static_cast<unsigned char>(s[0]))) return constant(literal(s, negative));
    if (is_special(s)) return entry_->specials[s] = register_of(s);
    if (s == "WARP_SZ") return constant(kLanes);
    for (const auto* table : {&locals_, &module_.globals})
      if (const auto found = table->find(s); found != table->end()) return constant(address_of(found->second));
    return known_register(s);
  }
  u64 address_of(const Variable& v) const {
    if (v.space != Space::Shared) return static_cast<u64>(v.value);
    return kSharedBase + (v.value < 0 ? round_up(entry_->shared_bytes, 16) : v.value);
  }
  Address address() {
    Address a{operand(), 0};
    while (peek() == "+" || peek() == "-") {
      bool negative = next() == "-";
      if (eat("-")) negative = !negative;
      const i64 x = static_cast<i64>(std::stoull(next(), nullptr, 0));
      a.offset += negative ? -x : x;
    }
    need("]");
    return a;
  }
  void operands(Instruction& n, bool result) {
    for (; !eat(";"); result = false, eat(",")) {
      if (eat("[")) {
        n.at.push_back(address());
        continue;
      }
      const bool list = eat("{");
      do {
        const bool negated = eat("!");
        const int x = operand();
        if (result) {
          n.to.push_back(x);
          if (eat("|")) n.to.push_back(operand());
        } else {
          n.from.push_back(x);
          n.negated.push_back(negated);
        }
      } while (list && eat(","));
      if (list) need("}");
    }
  }
  static bool has_result(const std::string& opcode) {
    const std::string name = opcode.substr(0, opcode.find('.'));
    if (name == "mbarrier") {
      static const char* const silent[] = {"mbarrier.init", "mbarrier.inval", "mbarrier.expect_tx",
                                           "mbarrier.complete_tx"};
      return std::none_of(std::begin(silent), std::end(silent), [&](auto p) { return opcode.rfind(p, 0) == 0; });
    }
    if (name == "barrier" || name == "bar") return opcode.find(".red") != std::string::npos;
    if (name == "st" || name == "red") return false;
    return !kNoResult.count(name);
  }
  // Some instructions' result may be left out: mbarrier.arrive of a remote object starts with its address.
  void instruction() {
    Instruction n;
    n.pc = static_cast<int>(entry_->code.size());
    n.file = file_, n.line = line_;
    const size_t begin = tokens_[at_].begin;
    if (eat("@")) {
      n.predicate_negated = eat("!");
      n.predicate = known_register(next());
    }
    const std::string opcode = next();
    decode(n, opcode);
    if (n.kind == Kind::Branch) {
      branches_.push_back({n.pc, next()});
      need(";");
    } else if (n.name == "call") {
      skip_past(";");
    } else {
      operands(n, has_result(opcode) && peek() != "[");
    }
    n.text = shortened(source_.substr(begin, tokens_[at_ - 1].begin - begin));
    choose_handler(n);
    entry_->async_proxy |= n.name == "cp" && n.rest.find(".bulk") != std::string::npos;
    entry_->code.push_back(std::move(n));
  }
  static std::string shortened(const std::string& s) {
    std::string out;
    for (const char c : s) {
      const bool blank = std::isspace(static_cast<unsigned char>(c));
      if (!blank) out += c;
      else if (!out.empty() && out.back() != ' ') out += ' ';
    }
    return out;
  }
};

}  // namespace

void parse(const std::string& text, Module& module) { Parser(text, module).run(); }

}  // namespace ptx
