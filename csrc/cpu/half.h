// IEEE half precision in integer arithmetic, for processors without conversion instructions.
#pragma once

#include <cstdint>
#include <cstring>

namespace kdops {

inline float float_from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline uint32_t bits_from_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  return bits;
}

inline float float_from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Not by arithmetic on the bits of a subnormal, which is 0 where a thread flushes those.
  const uint32_t normal = (magnitude << 13) + 0x38000000u;
  const uint32_t subnormal = bits_from_float(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_from_bits(sign | (magnitude < 0x400u ? subnormal : normal));
}

inline uint16_t half_from_float(float f) {
  const uint32_t bits = bits_from_float(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to inf
  if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 round to a multiple of 2^-24
    const uint32_t rounded = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t nearest_even = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((nearest_even - 0x38000000u) >> 13));
}

}  // namespace kdops
