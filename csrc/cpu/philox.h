// Philox4x32-10 (Salmon et al. 2011), word 0, compared with a threshold for MGD's mask.
#pragma once

#include <cstdint>

namespace kdops {

inline uint32_t philox_word(uint64_t key, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1), c3 = static_cast<uint32_t>(product0);
    c0 = next0, c2 = next2;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return c0;
}

}  // namespace kdops
