#include "isa.h"

#include <stdexcept>

namespace kdops {
namespace {

struct Available {
  std::vector<Kernels<float>> floats;
  std::vector<Kernels<double>> doubles;
  size_t chosen = 0;
};

// The instruction sets of this processor, the widest first.
Available detect() {
  Available found;
#ifdef KDOPS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.floats.push_back(avx512_float_kernels()), found.doubles.push_back(avx512_double_kernels());
  if (avx2) found.floats.push_back(avx2_float_kernels()), found.doubles.push_back(avx2_double_kernels());
#endif
  found.floats.push_back(portable_float_kernels()), found.doubles.push_back(portable_double_kernels());
  return found;
}

Available& available() {
  static Available found = detect();
  return found;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return available().floats[available().chosen];
}
template <>
const Kernels<double>& kernels<double>() {
  return available().doubles[available().chosen];
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& k : available().floats) names.emplace_back(k.name);
  return names;
}

void use_instruction_set(const std::string& name) {
  const auto& all = available().floats;
  for (size_t i = 0; i < all.size(); ++i) {
    if (name == all[i].name) {
      available().chosen = i;
      return;
    }
  }
  throw std::invalid_argument("use_instruction_set: this processor has no '" + name + "'");
}

}  // namespace kdops
