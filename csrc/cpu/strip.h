// The interface of the vector kernels, without PyTorch: element types, strips of a map, and the table of kernels.
#pragma once

#include <cstdint>

#include "gather.h"

namespace kdops {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int kDtypes = 4;

// A strip is what one kernel call reads: either one row (n, c), with positions in the lanes of a register, or as many
// rows (n, c...c+lanes) as a register has lanes, one position after the other (channels_last). Position (i, j) of
// `segments` x `length` is at data + i * segment_stride + j * step, in elements. `next`, if not 0, is the offset of the
// strip to prefetch.
struct Strip {
  void* data;
  int64_t segments, segment_stride;
  int64_t length, step;
  int64_t next = 0;
};

enum Lanes : int { kPositionsInLanes = 0, kChannelsInLanes = 1 };

// Per-row numbers are in arrays of the accumulation type A (float or double), one entry a row. A kernel gets the
// address of the first of its `rows` entries (1, or the lanes in use). A mean is stored as a sum: `mean` is the nearest
// A, `mean_lo` the remainder, without which x - mean of a map whose mean is 1000 deviations would be off by 3e-5
// deviations.
template <class A>
struct Moments {  // out
  A *mean, *mean_lo, *m2, *max;
};
template <class A>
struct SoftmaxIn {
  const A *k_s, *m_s, *k_t, *m_t;
};
// Sums over e_s = exp(k_s (s - m_s)) and e_t. z_gap is the sum of e_s - e_t: z_s - z_t would cancel when the student
// is close to the teacher. et_log is the sum of e_t log2(e_t / e_s).
struct SoftmaxOut {
  double *z_s, *z_t, *z_gap, *es_s, *et_s, *et_log;
};
template <class A>
struct GradientIn {  // dS = a e_s - b e_t - slope (s - mean), without the last term where slope is null
  const A *k_s, *m_s, *k_t, *m_t, *a, *b, *slope, *mean, *mean_lo;
};
struct CoMoments {  // out; dd is the centred sum of (s - t)^2
  double *mean_s, *mean_t, *ss, *tt, *st, *dd;
};
struct AffineIn {  // dS = alpha (s - mean_s) - beta (t - mean_t)
  const double *alpha, *mean_s, *beta, *mean_t;
};

// Kernels of one instruction set for accumulation type A; S and T are dtypes of student and teacher.
template <class A>
struct Kernels {
  void (*moments[kDtypes][2])(const Strip& x, int rows, Moments<A> out);
  void (*softmax[kDtypes][kDtypes][2])(const Strip& s, const Strip& t, int rows, SoftmaxIn<A> in, SoftmaxOut out);
  void (*gradient[kDtypes][kDtypes][2])(const Strip& s, const Strip& t, const Strip& ds, int rows, GradientIn<A> in);
  void (*co_moments[kDtypes][kDtypes][2])(const Strip& s, const Strip& t, int rows, CoMoments out);
  void (*affine[kDtypes][kDtypes][2])(const Strip& s, const Strip& t, const Strip& ds, int rows, AffineIn in);
  // ds = factor (s - t) where ds has data, and the sum of (s - t)^2 per row where `sum` is given. ds may be s.
  void (*difference[kDtypes][kDtypes][2])(const Strip& s, const Strip& t, const Strip& ds, int rows, A factor, A* sum);
  void (*scale[kDtypes])(const void* in, void* out, int64_t count, A factor);
  GatherKernels gather;  // float only
  int lanes;
  const char* name;
};

// The kernels of the instruction set in use, by default the widest of this processor.
template <class A>
const Kernels<A>& kernels();

}  // namespace kdops
