// Packs of elements, and the running moments of a lane, a warp, a channel.
#pragma once

#include "device.h"

namespace kdops::cuda {

template <class T, int V>
struct Pack {
  T x[V];
};

// Positions of a piece.
KDOPS_FN int length_of(const Level& level, int piece) {
  const int left = level.positions - piece % level.splits * level.chunk;
  return left < level.chunk ? left : level.chunk;
}

// From shared memory where a channel is on chip, else from global memory.
template <bool kOnChip, int V, class T>
KDOPS_FN void load(const T* p, float (&x)[V]) {
  Pack<T, V> pack;
  if constexpr (kOnChip) {
    pack = device::load_shared<Pack<T, V>>(p);
  } else {
    pack = device::load_global<Pack<T, V>>(p);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = device::widen(pack.x[i]);
}

template <int V, class T>
KDOPS_FN void store(T* p, const float (&x)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) device::narrow(x[i], pack.x[i]);
  device::store_global(p, pack);
}

KDOPS_FN float greater(float a, float b) { return a > b ? a : b; }

KDOPS_FN float warp_sum(float x) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += device::shuffle_xor(x, mask);
  return x;
}
KDOPS_FN float warp_max(float x) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = greater(x, device::shuffle_xor(x, mask));
  return x;
}

// Count, mean and sum of squared deviations, merged by Chan's formula. A negative m2 cannot arise.
struct Moments {
  float count, mean, m2;
};
KDOPS_FN Moments merged(Moments a, Moments b) {
  const float count = a.count + b.count, share = device::divide(b.count, greater(count, 1.0f));
  const float away = b.mean - a.mean;
  return {count, a.mean + away * share, a.m2 + b.m2 + away * away * (a.count * share)};
}
// Lane 0 has the result.
KDOPS_FN Moments warp_merged(Moments a) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    using device::shuffle_xor;
    a = merged(a, {shuffle_xor(a.count, mask), shuffle_xor(a.mean, mask), shuffle_xor(a.m2, mask)});
  }
  return a;
}

// The same of two maps together, with the sum of products of their deviations.
struct CoMoments {
  float count, mean_s, mean_t, ss, tt, st;
};
KDOPS_FN CoMoments merged(CoMoments a, CoMoments b) {
  const float count = a.count + b.count, share = device::divide(b.count, greater(count, 1.0f));
  const float s = b.mean_s - a.mean_s, t = b.mean_t - a.mean_t, between = a.count * share;
  return {count,
          a.mean_s + s * share,
          a.mean_t + t * share,
          a.ss + b.ss + s * s * between,
          a.tt + b.tt + t * t * between,
          a.st + b.st + s * t * between};
}
KDOPS_FN CoMoments warp_merged(CoMoments a) {
  using device::shuffle_xor;
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    a = merged(a, {shuffle_xor(a.count, mask), shuffle_xor(a.mean_s, mask), shuffle_xor(a.mean_t, mask),
                   shuffle_xor(a.ss, mask), shuffle_xor(a.tt, mask), shuffle_xor(a.st, mask)});
  }
  return a;
}

// A lane sums deviations from the first element it sees. An outlier there costs no accuracy that matters: it is then
// part of the variance itself, and the lane has few elements.
struct LaneMoments {
  float first = 0, sum = 0, squares = 0;
  template <int V>
  KDOPS_FN void add(const float (&x)[V], bool is_first) {
    if (is_first) first = x[0];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = x[i] - first;
      sum += d;
      squares += d * d;
    }
  }
  KDOPS_FN Moments moments(float count) const {
    const float away = device::divide(sum, greater(count, 1.0f)), m2 = squares - away * sum;
    return {count, first + away, m2 < 0 ? 0.0f : m2};  // NaN stays
  }
};

struct LaneCoMoments {
  float first_s = 0, first_t = 0, sum_s = 0, sum_t = 0, ss = 0, tt = 0, st = 0;
  template <int V>
  KDOPS_FN void add(const float (&s)[V], const float (&t)[V], bool is_first) {
    if (is_first) first_s = s[0], first_t = t[0];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float ds = s[i] - first_s, dt = t[i] - first_t;
      sum_s += ds, sum_t += dt;
      ss += ds * ds, tt += dt * dt, st += ds * dt;
    }
  }
  KDOPS_FN CoMoments moments(float count) const {
    const float share = device::divide(1.0f, greater(count, 1.0f)), s = sum_s * share, t = sum_t * share;
    const float own_ss = ss - s * sum_s, own_tt = tt - t * sum_t;
    return {count, first_s + s, first_t + t, own_ss < 0 ? 0.0f : own_ss, own_tt < 0 ? 0.0f : own_tt, st - s * sum_t};
  }
};

// 1/sqrt(var+eps) or 1/(std+eps) of a channel, and the factor of the projection in its backward.
struct Scale {
  float r, q;
};
KDOPS_FN Scale channel_scale(int norm, float eps, float m2, float count) {
  if (norm == kNoNorm) return {1.0f, 0.0f};
  if (norm == kBatchNorm) {
    const float r = 1.0f / sqrtf(m2 / count + eps);
    return {r, r / count};
  }
  const float deviation = sqrtf(m2 / (count - 1.0f));
  // Where the deviation is 0 its gradient is taken as 0, as torch.std does.
  return {1.0f / (deviation + eps), deviation == 0 ? 0.0f : 1.0f / ((count - 1.0f) * deviation)};
}

}  // namespace kdops::cuda
