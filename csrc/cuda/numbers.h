// Packs of elements, and running moments of a lane, a warp and a channel.
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

// A number as a sum hi + lo. A mean in one fp32 number has a relative error of 2^-24, which matters to the gradient if
// the mean is many deviations away from 0.
struct Wide {
  float hi, lo;
};
// a + b without rounding (Knuth).
KDOPS_FN Wide exact_sum(float a, float b) {
  const float hi = a + b, part = hi - a;
  return {hi, (a - (hi - part)) + (b - part)};
}
KDOPS_FN Wide moved(Wide a, float step) {
  const Wide sum = exact_sum(a.hi, step);
  return {sum.hi, sum.lo + a.lo};
}
// Without a branch, so that the lanes of a warp do not diverge before a shuffle.
KDOPS_FN Wide chosen(bool first, Wide a, Wide b) { return {first ? a.hi : b.hi, first ? a.lo : b.lo}; }
KDOPS_FN float step_between(Wide a, Wide b) { return (b.hi - a.hi) + (b.lo - a.lo); }

// The weights of Chan's formula, from the counts of both sides.
struct Shares {
  float count, of_b, between;
};
KDOPS_FN Shares shares_of(float a, float b) {
  const float count = a + b, of_b = device::divide(b, greater(count, 1.0f));
  return {count, of_b, a * of_b};
}

// Count, mean and sum of squared deviations, merged by Chan's formula. m2 is never negative.
struct Moments {
  float count;
  Wide mean;
  float m2;
};
KDOPS_FN Moments merged(Moments a, Moments b) {
  const Shares shares = shares_of(a.count, b.count);
  // An empty side takes the other's mean directly: the division is approximate, and b / b may be less than 1.
  a.mean = chosen(a.count == 0, b.mean, a.mean);
  const float step = step_between(a.mean, b.mean);
  return {shares.count, moved(a.mean, step * shares.of_b), a.m2 + b.m2 + step * step * shares.between};
}
// Lane 0 has the result.
KDOPS_FN Moments warp_merged(Moments a) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    using device::shuffle_xor;
    const Wide mean = {shuffle_xor(a.mean.hi, mask), shuffle_xor(a.mean.lo, mask)};
    a = merged(a, {shuffle_xor(a.count, mask), mean, shuffle_xor(a.m2, mask)});
  }
  return a;
}

// The same for two maps: with u = s - t and v = s + t, the centred sums SS, TT, ST, UU and UV = SS - TT. The last two
// are accurate where the maps are nearly equal, and cannot be computed from the first three then.
struct CoMoments {
  float count;
  Wide s, t, u;
  float ss, tt, st, uu, uv;
};
KDOPS_FN CoMoments merged(CoMoments a, CoMoments b) {
  const Shares shares = shares_of(a.count, b.count);
  const bool none = a.count == 0;
  a.s = chosen(none, b.s, a.s), a.t = chosen(none, b.t, a.t), a.u = chosen(none, b.u, a.u);
  const float s = step_between(a.s, b.s), t = step_between(a.t, b.t), u = step_between(a.u, b.u);
  return {shares.count,
          moved(a.s, s * shares.of_b),
          moved(a.t, t * shares.of_b),
          moved(a.u, u * shares.of_b),
          a.ss + b.ss + s * s * shares.between,
          a.tt + b.tt + t * t * shares.between,
          a.st + b.st + s * t * shares.between,
          a.uu + b.uu + u * u * shares.between,
          a.uv + b.uv + u * (s + t) * shares.between};
}

// All fields but the count, as they are exchanged between lanes, warps and blocks.
constexpr int kCoMoments = 11;
KDOPS_FN void values_of(const CoMoments& m, float (&x)[kCoMoments]) {
  const float values[kCoMoments] = {m.s.hi, m.s.lo, m.t.hi, m.t.lo, m.u.hi, m.u.lo, m.ss, m.tt, m.st, m.uu, m.uv};
#pragma unroll
  for (int i = 0; i < kCoMoments; ++i) x[i] = values[i];
}
template <class Value>
KDOPS_FN CoMoments comoments_from(float count, Value&& x) {
  return {count, {x(0), x(1)}, {x(2), x(3)}, {x(4), x(5)}, x(6), x(7), x(8), x(9), x(10)};
}
KDOPS_FN CoMoments warp_merged(CoMoments a) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    float own[kCoMoments];
    values_of(a, own);
    const float count = device::shuffle_xor(a.count, mask);
    a = merged(a, comoments_from(count, [&](int i) { return device::shuffle_xor(own[i], mask); }));
  }
  return a;
}

// A lane sums deviations from its first element. An outlier there does not hurt the accuracy: it dominates the variance
// itself, and the lane has few elements.
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
    return {count, exact_sum(first, away), m2 < 0 ? 0.0f : m2};  // NaN stays
  }
};

struct LaneCoMoments {
  float first_s = 0, first_t = 0;
  Wide first_u = {0, 0};
  float sum_s = 0, sum_t = 0, sum_u = 0, ss = 0, tt = 0, st = 0, uu = 0, uv = 0;
  template <int V>
  KDOPS_FN void add(const float (&s)[V], const float (&t)[V], bool is_first) {
    if (is_first) first_s = s[0], first_t = t[0], first_u = exact_sum(s[0], -t[0]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float ds = s[i] - first_s, dt = t[i] - first_t, u = s[i] - t[i];
      // If the maps are close, ds - dt has the rounding errors of both; if their means are far apart, u is rounded.
      const float du = fabsf(u) > fabsf(ds) + fabsf(dt) ? ds - dt : u - first_u.hi;
      sum_s += ds, sum_t += dt, sum_u += du;
      ss += ds * ds, tt += dt * dt, st += ds * dt, uu += du * du, uv += du * (ds + dt);
    }
  }
  KDOPS_FN CoMoments moments(float count) const {
    const float share = device::divide(1.0f, greater(count, 1.0f));
    const float s = sum_s * share, t = sum_t * share, u = sum_u * share;
    const Wide mean_u = exact_sum(first_u.hi, u);
    const float own_ss = ss - s * sum_s, own_tt = tt - t * sum_t, own_uu = uu - u * sum_u;
    return {count,
            exact_sum(first_s, s),
            exact_sum(first_t, t),
            {mean_u.hi, mean_u.lo + first_u.lo},
            own_ss < 0 ? 0.0f : own_ss,
            own_tt < 0 ? 0.0f : own_tt,
            st - s * sum_t,
            own_uu < 0 ? 0.0f : own_uu,
            uv - u * (sum_s + sum_t)};
  }
};

// 1/sqrt(var+eps) or 1/(std+eps) of a channel, the factor of the projection in its backward, and the root itself.
struct Scale {
  float r, q, root;
};
KDOPS_FN Scale channel_scale(int norm, float eps, float m2, float count) {
  if (norm == kNoNorm) return {1.0f, 0.0f, 1.0f};
  if (norm == kBatchNorm) {
    const float root = sqrtf(m2 / count + eps), r = 1.0f / root;
    return {r, r / count, root};
  }
  const float deviation = sqrtf(m2 / (count - 1.0f));
  // Where the deviation is 0, its gradient is defined as 0, as in torch.std.
  return {1.0f / (deviation + eps), deviation == 0 ? 0.0f : 1.0f / ((count - 1.0f) * deviation), deviation};
}

}  // namespace kdops::cuda
