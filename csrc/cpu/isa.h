// Instruction sets: which ones this processor has, and how to compile a region of code for one of them.
#pragma once

#include <string>
#include <vector>

#include "strip.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define KDOPS_X86 1
#endif

#define KDOPS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define KDOPS_TARGET_BEGIN_AVX512 \
  KDOPS_PRAGMA(clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function))
#define KDOPS_TARGET_BEGIN_AVX2 \
  KDOPS_PRAGMA(clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function))
#define KDOPS_TARGET_END KDOPS_PRAGMA(clang attribute pop)
#else
#define KDOPS_TARGET_BEGIN_AVX512 \
  KDOPS_PRAGMA(GCC push_options) KDOPS_PRAGMA(GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))
#define KDOPS_TARGET_BEGIN_AVX2 KDOPS_PRAGMA(GCC push_options) KDOPS_PRAGMA(GCC target("avx2,fma,f16c"))
#define KDOPS_TARGET_END KDOPS_PRAGMA(GCC pop_options)
#endif

namespace kdops {

Kernels<float> portable_float_kernels();
Kernels<double> portable_double_kernels();
#ifdef KDOPS_X86
Kernels<float> avx2_float_kernels();
Kernels<double> avx2_double_kernels();
Kernels<float> avx512_float_kernels();
Kernels<double> avx512_double_kernels();
#endif

// The instruction sets of this processor, the widest first. The widest is used unless another is chosen by name.
std::vector<std::string> instruction_sets();
void use_instruction_set(const std::string& name);

}  // namespace kdops
