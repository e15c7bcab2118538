// The device functions of the CUDA kernels on a CPU: the threads of a block are fibers on one thread. This tests
// arithmetic, indexing and barriers (any order of fibers must give the same bits), not speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/half.h"
#include "cuda/problem.h"

// Visible, so that a kernel's address leads to its name, which is that of its PTX.
#define KDOPS_KERNEL(threads, blocks) __attribute__((visibility("default"))) void
#define KDOPS_FN inline
#define KDOPS_PARAMETER const

namespace kdops::cuda::device {

int thread();
int threads();
int block();
int blocks();
inline int lane() { return thread() % kLanes; }
inline int warp() { return thread() / kLanes; }
inline int warps() { return threads() / kLanes; }
char* shared_memory();
void sync_block();
float shuffle_xor(float x, int mask);
void cluster_arrive();
void cluster_wait();
const float* of_rank(const float* p, int rank);
void arrive(unsigned* counter);
void wait_for(const unsigned* counter, unsigned count);
inline float load_shared_between_blocks(const float* p) { return *p; }
inline void store_shared_between_blocks(float* p, float x) { *p = x; }
// The data arrives only when it is waited for.
void copy_16_async(void* shared, const void* global);
void close_copy_group();
void wait_for_copies(int open);
void check_shared(const void* p, int bytes);
void count_load(int bytes);
void count_store(int bytes);

template <class Values>
inline Values copied(const void* p) {
  Values v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
void check_alignment(const void* p, int bytes);
template <class Values>
inline Values load_shared(const void* p) {
  check_shared(p, sizeof(Values));
  return copied<Values>(p);
}
template <class Values>
inline void store_shared(void* p, const Values& v) {
  check_shared(p, sizeof(Values));
  std::memcpy(p, &v, sizeof(v));
}
template <class Values>
inline Values load_global(const void* p) {
  check_alignment(p, sizeof(Values));
  count_load(sizeof(Values));
  return copied<Values>(p);
}
template <class Values>
inline void store_global(void* p, const Values& v) {
  check_alignment(p, sizeof(Values));
  count_store(sizeof(Values));
  std::memcpy(p, &v, sizeof(v));
}

inline float exp2(float x) { return std::exp2(x); }
// As div.approx is documented: n / n may be less than 1.
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a * (1.0f / b); }

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) { return float_from_half(x.bits); }
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, BFloat16& y) {
  const uint32_t bits = bits_from_float(x);
  y.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float x, Float16& y) { y.bits = half_from_float(x); }

}  // namespace kdops::cuda::device
