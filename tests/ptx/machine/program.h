// PTX as the parser leaves it: modules, entries and decoded instructions.
#pragma once

#include <climits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"

namespace ptx {

struct Machine;
struct Warp;
struct Instruction;

// Executes an instruction for the lanes of a warp that are together.
using Handler = void (*)(Machine&, Warp&, const Instruction&, u32 lanes);

enum class Compare : u8 { None, Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };
enum class Combine : u8 { None, And, Or, Xor };

// Modifiers that are there or not.
enum Flag : u32 {
  kFtz = 1, kSat = 1 << 1, kApprox = 1 << 2, kFull = 1 << 3, kWide = 1 << 4, kHigh = 1 << 5, kLow = 1 << 6,
  kNanWins = 1 << 7, kRelu = 1 << 8, kTranspose = 1 << 9, kAligned = 1 << 10, kUniform = 1 << 11, kStrong = 1 << 12,
  kAcquire = 1 << 13, kRelease = 1 << 14, kNonCoherent = 1 << 15, kToInteger = 1 << 16, kBlockScope = 1 << 17,
  kRelaxed = 1 << 18, kClusterWindow = 1 << 19, kVolatile = 1 << 20
};

// How the scheduler treats an instruction.
enum class Kind : u8 { Plain, Branch, Exit, Together, BlockBarrier, ClusterArrive, ClusterWait, Sleep };

constexpr int kNothing = INT_MIN;  // no register
constexpr int kSink = INT_MAX;     // the register "_"

struct Address {
  int base;
  i64 offset;
};

struct Instruction {
  std::string name, rest;  // opcode, and the modifiers that no field below holds, as ".a.b"
  Type type = Type::None, type2 = Type::None;
  Space space = Space::Generic, space2 = Space::Generic;  // as written, left to right
  u8 vector = 1;
  u32 flags = 0;
  Compare compare = Compare::None;
  Combine combine = Combine::None;
  Round round = Round::None;
  Kind kind = Kind::Plain;
  bool together = false;      // waits for its member lanes
  bool member_mask = false;   // the last operand names them; otherwise all lanes that live
  int predicate = kNothing;
  bool predicate_negated = false;
  std::vector<int> to, from;  // registers, or ~index of a constant
  std::vector<bool> negated;  // of `from`
  std::vector<Address> at;
  int target = -1, pc = 0, file = 0, line = 0;
  std::string text, unsupported;
  Handler run = nullptr;

  bool has(Flag flag) const { return flags & flag; }
  // Whether `rest` has this modifier.
  bool says(const char* modifier) const {
    const std::string word = std::string(".") + modifier;
    for (size_t at = rest.find(word); at != std::string::npos; at = rest.find(word, at + 1)) {
      const size_t end = at + word.size();
      if (end == rest.size() || rest[end] == '.') return true;
    }
    return false;
  }
};

struct Parameter {
  std::string name;
  int offset, size;
};
struct Entry {
  std::string name;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0, registers = 0, shared_bytes = 0, local_bytes = 0, most_threads = 0;
  bool exact_threads = false;
  std::vector<Instruction> code;
  std::vector<u64> constants;  // a value for every lane
  std::map<std::string, int> specials;  // name -> register
  bool async_proxy = false;             // has bulk copies
};
struct Variable {
  Space space;
  i64 value;
};
struct Module {
  std::map<std::string, std::unique_ptr<Entry>> entries;
  std::map<int, std::string> files;
  std::map<std::string, Variable> globals;
  std::vector<std::vector<u8>> storage;  // of the globals
  std::vector<std::pair<u64, u64>> storage_ranges;
};

void parse(const std::string& text, Module& module);
// Fills the fields that an opcode's modifiers determine, and chooses the handler.
void decode(Instruction& instruction, const std::string& opcode);
void choose_handler(Instruction& instruction);

// Each returns null where an instruction is not of its family; they throw Unsupported for a form they do not know.
Handler integer_handler(const Instruction&);
Handler bits_handler(const Instruction&);
Handler float_handler(const Instruction&);
Handler approximate_handler(const Instruction&);
Handler convert_handler(const Instruction&);
Handler compare_handler(const Instruction&);
Handler warp_handler(const Instruction&);
Handler memory_handler(const Instruction&);
Handler atomic_handler(const Instruction&);
Handler address_handler(const Instruction&);
Handler copy_handler(const Instruction&);
Handler bulk_handler(const Instruction&);
Handler mbarrier_handler(const Instruction&);
Handler control_handler(const Instruction&);

}  // namespace ptx
