// The types of PTX, and where an address may lie.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kWholeWarp = ~0u;

enum class Type : u8 {
  None, Pred, B8, U8, S8, B16, U16, S16, B32, U32, S32, B64, U64, S64, B128, F16, BF16, F32, F64, F16x2, BF16x2, F32x2
};

inline int bytes_of(Type t) {
  switch (t) {
    case Type::Pred: case Type::B8: case Type::U8: case Type::S8: return 1;
    case Type::B16: case Type::U16: case Type::S16: case Type::F16: case Type::BF16: return 2;
    case Type::B64: case Type::U64: case Type::S64: case Type::F64: case Type::F32x2: return 8;
    case Type::B128: return 16;
    default: return 4;
  }
}
inline bool is_float(Type t) { return t >= Type::F16 && t <= Type::F64; }
inline bool is_pair(Type t) { return t >= Type::F16x2; }
inline bool is_signed(Type t) { return t == Type::S8 || t == Type::S16 || t == Type::S32 || t == Type::S64; }
inline bool is_integer(Type t) { return t >= Type::B8 && t <= Type::S64; }
// All bits of a value of this many bytes.
inline u64 mask_of(int bytes) { return bytes >= 8 ? ~0ull : (1ull << (8 * bytes)) - 1; }

enum class Space : u8 { Generic, Global, Shared, Local, Param, Const };

// What the interpreter does not know; the kernel cannot be judged.
struct Unsupported : std::runtime_error {
  using runtime_error::runtime_error;
};
struct ParseError : std::runtime_error {
  using runtime_error::runtime_error;
};

// Addresses of the shared window: offset in a block, and in the top byte 1 + the rank of a block of the cluster, 0 for
// the executing block. Offsets start where CUDA's reserved part ends, so that 0 is never valid.
constexpr u32 kSharedBase = 1024;
constexpr u32 kOffsetBits = 24;
constexpr u32 kOffsetMask = (1u << kOffsetBits) - 1;
// Generic addresses: a tag in the top byte, or global memory.
constexpr u64 kSharedTag = 0x7e00000000000000ull, kLocalTag = 0x7d00000000000000ull, kParamTag = 0x7c00000000000000ull,
              kTagMask = 0xff00000000000000ull;

}  // namespace ptx
