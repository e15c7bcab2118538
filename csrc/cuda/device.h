// Thin wrappers around the instructions that the kernels use. With a host compiler the same names come from a shim that
// runs the threads of a block as fibers (tests/cuda_shim), so that the kernels' arithmetic and indexing are tested
// without a GPU.
#pragma once

#ifdef KDOPS_HOST_SHIM
#include "shim_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"

#define KDOPS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define KDOPS_FN __device__ __forceinline__
#define KDOPS_PARAMETER const __grid_constant__

namespace kdops::cuda::device {

KDOPS_FN int thread() { return threadIdx.x; }
KDOPS_FN int threads() { return blockDim.x; }
KDOPS_FN int block() { return blockIdx.x; }
KDOPS_FN int blocks() { return gridDim.x; }
KDOPS_FN int lane() { return threadIdx.x % kLanes; }
KDOPS_FN int warp() { return threadIdx.x / kLanes; }
KDOPS_FN int warps() { return blockDim.x / kLanes; }

KDOPS_FN char* shared_memory() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

KDOPS_FN void sync_block() { __syncthreads(); }
KDOPS_FN float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// ---- thread-block clusters: launched only where the code is of sm_90 or later, and a trap in older code ------------
KDOPS_FN void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
KDOPS_FN void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}
// The same address in the shared memory of another block of the cluster.
KDOPS_FN const float* of_rank(const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
  const float* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
#else
  __trap();
  return p;
#endif
}

// ---- signals between blocks through device memory -------------------------------------------------------------------
KDOPS_FN void arrive(unsigned* counter) {
  __threadfence();
  atomicAdd(counter, 1u);
}
KDOPS_FN void wait_for(const unsigned* counter, unsigned count) {
  while (*static_cast<const volatile unsigned*>(counter) < count) __nanosleep(32);
  __threadfence();
}
// Bypass L1, which is not coherent with another block's store.
KDOPS_FN float load_shared_between_blocks(const float* p) { return __ldcg(p); }
KDOPS_FN void store_shared_between_blocks(float* p, float x) { __stcg(p, x); }

// ---- copies into shared memory that run beside arithmetic -----------------------------------------------------------
KDOPS_FN void copy_16_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}
KDOPS_FN void close_copy_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `open` of this thread's latest groups are in flight.
KDOPS_FN void wait_for_copies(int open) {
#if __CUDA_ARCH__ >= 800
  switch (open) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
  }
#endif
}

// ---- loads and stores of `Bytes` at once: 2, 4, 8 or 16 -------------------------------------------------------------
template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// `Values` is a plain struct of that many bytes.
template <class Values>
KDOPS_FN Values load_shared(const void* p) {
  const auto word = *static_cast<const typename Word<sizeof(Values)>::type*>(p);
  Values v;
  memcpy(&v, &word, sizeof(v));
  return v;
}
template <class Values>
KDOPS_FN void store_shared(void* p, const Values& v) {
  typename Word<sizeof(Values)>::type word;
  memcpy(&word, &v, sizeof(v));
  *static_cast<typename Word<sizeof(Values)>::type*>(p) = word;
}
template <class Values>
KDOPS_FN Values load_global(const void* p) {
  const auto word = __ldg(static_cast<const typename Word<sizeof(Values)>::type*>(p));
  Values v;
  memcpy(&v, &word, sizeof(v));
  return v;
}
// Gradients are not read again by this kernel: evict them first.
template <class Values>
KDOPS_FN void store_global(void* p, const Values& v) {
  typename Word<sizeof(Values)>::type word;
  memcpy(&word, &v, sizeof(v));
  __stcs(static_cast<typename Word<sizeof(Values)>::type*>(p), word);
}

// ---- numbers --------------------------------------------------------------------------------------------------------
KDOPS_FN float exp2(float x) {  // 2 ulp; subnormal results are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A product that is not fused into a sum: a x - b y is 0 where the products are equal, fma(a, x, -(b y)) is not.
KDOPS_FN float multiply(float a, float b) { return __fmul_rn(a, b); }
KDOPS_FN float divide(float a, float b) { return __fdividef(a, b); }  // 2 ulp, for b within 2^-126 to 2^126

KDOPS_FN float widen(float x) { return x; }
KDOPS_FN float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
KDOPS_FN float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
KDOPS_FN void narrow(float x, float& y) { y = x; }
KDOPS_FN void narrow(float x, BFloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
KDOPS_FN void narrow(float x, Float16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }

}  // namespace kdops::cuda::device

#endif
