// The vector kernels: sums and gradients over one strip. Included once per instruction set, after vec.h.
//
// A sweep calls a body with the registers of one or two strips and a mask of the lanes in use, and stores what the body
// returns to a third strip if there is one. Full registers have the mask `All`, which compiles to nothing.

struct All {
  template <class V>
  V keep(V v) const {
    return v;
  }
  template <class V>
  V keep_or(V v, V) const {
    return v;
  }
};
template <class A>
struct Some {
  MaskVec<A> used;
  Vec<A> keep(Vec<A> v) const { return used ? v : Vec<A>{}; }
  Vec<A> keep_or(Vec<A> v, Vec<A> other) const { return used ? v : other; }
};

template <class A>
inline Some<A> first(int count) {
  Some<A> mask{};
  for (int i = 0; i < lanes_of<A>; ++i) mask.used[i] = i < count ? -1 : 0;
  return mask;
}

// Accumulators are flushed to double after this many registers, so that a long sum is as accurate as a short one.
constexpr int64_t kFlush = 32;

template <class T>
inline const T* at(const Strip& x, int64_t segment, int64_t j) {
  return static_cast<const T*>(x.data) + segment * x.segment_stride + j * x.step;
}

template <class T>
inline void fetch_next(const Strip& x, int64_t segment, int64_t j) {
  __builtin_prefetch(at<T>(x, segment, j) + x.next, 0, 2);
}

// Destinations of a body's results: none, or a strip.
struct Nowhere {
  template <class Body, class V, class M>
  void one(int64_t, int64_t, int, Body& body, V x, V y, M mask) const {
    body(x, y, mask);
  }
  template <class Body, class V>
  void two(int64_t, int64_t, Body& body, const V* x, const V* y) const {
    body(x[0], y[0], All{}), body(x[1], y[1], All{});
  }
};
template <class A, class S>
struct Into {
  const Strip& strip;
  S* at_position(int64_t segment, int64_t j) const { return const_cast<S*>(at<S>(strip, segment, j)); }
  template <class Body, class M>
  void one(int64_t segment, int64_t j, int count, Body& body, Vec<A> x, Vec<A> y, M mask) const {
    const Vec<A> v = body(x, y, mask);
    if (count == lanes_of<A>)
      narrow(at_position(segment, j), v);
    else
      narrow_part<A>(at_position(segment, j), v, count);
  }
  template <class Body>
  void two(int64_t segment, int64_t j, Body& body, const Vec<A>* x, const Vec<A>* y) const {
    const Vec<A> first = body(x[0], y[0], All{}), second = body(x[1], y[1], All{});
    narrow_two(at_position(segment, j), first, second);
  }
};

// out = body(s, t, mask); flush() after every kFlush registers and at the end. Registers are processed in pairs if both
// maps are deinterleaved in the same way.
template <class A, class S, class T, int kMode, class Out, class Body, class Flush>
inline void sweep(const Strip& s, const Strip& t, int rows, const Out& out, Body&& body, Flush&& flush) {
  constexpr int64_t width = lanes_of<A>;
  constexpr bool in_pairs = comes_apart<S> == comes_apart<T>;
  int64_t since = 0;
  for (int64_t i = 0; i < s.segments; ++i) {
    if (kMode == kPositionsInLanes) {
      int64_t j = 0;
      while (j + width <= s.length) {
        const int64_t whole = j + (s.length - j) / width * width;
        const int64_t stop = whole < j + kFlush * width ? whole : j + kFlush * width;
        for (; in_pairs && j + 2 * width <= stop; j += 2 * width) {
          if (s.next) {
            fetch_next<S>(s, i, j), fetch_next<T>(t, i, j);
            if (sizeof(S) * width >= 64) fetch_next<S>(s, i, j + width), fetch_next<T>(t, i, j + width);
          }
          Vec<A> x[2], y[2];
          widen_two(at<S>(s, i, j), x[0], x[1]), widen_two(at<T>(t, i, j), y[0], y[1]);
          out.two(i, j, body, x, y);
        }
        for (; j < stop; j += width) out.one(i, j, width, body, widen(at<S>(s, i, j)), widen(at<T>(t, i, j)), All{});
        flush();
      }
      if (const int rest = static_cast<int>(s.length - j)) {
        const Vec<A> x = widen_part<A>(at<S>(s, i, j), rest), y = widen_part<A>(at<T>(t, i, j), rest);
        out.one(i, j, rest, body, x, y, first<A>(rest));
        flush();
      }
    } else {
      const bool full = rows == width;
      const Some<A> mask = first<A>(rows);
      for (int64_t j = 0; j < s.length; ++j) {
        if (full)
          out.one(i, j, width, body, widen(at<S>(s, i, j)), widen(at<T>(t, i, j)), All{});
        else
          out.one(i, j, rows, body, widen_part<A>(at<S>(s, i, j), rows), widen_part<A>(at<T>(t, i, j), rows), mask);
        if (++since == kFlush) flush(), since = 0;
      }
    }
  }
  flush();
}

// A sum of partial sums in A, accumulated in double.
template <class A>
struct Sum {
  Vec<A> now{};
  WideVec<A> total{};
  void add(Vec<A> v) { now += v; }
  void flush() {
    total += __builtin_convertvector(now, WideVec<A>);
    now = Vec<A>{};
  }
};
template <class A>
inline Vec<A> narrowed(WideVec<A> v) {
  return __builtin_convertvector(v, Vec<A>);
}

// Per-row numbers: one for the whole register (positions in lanes) or one per lane (channels in lanes).
template <class A, int kMode>
inline Vec<A> per_row(const A* p, int rows) {
  return kMode == kPositionsInLanes ? broadcast<A>(*p) : widen_part<A>(p, rows);
}
// A double as the nearest A and the remainder.
template <class A, int kMode>
inline void per_row_in_two(const double* p, int rows, Vec<A>& nearest, Vec<A>& rest) {
  if (kMode == kPositionsInLanes) {
    const A value = static_cast<A>(*p);
    nearest = broadcast<A>(value), rest = broadcast<A>(static_cast<A>(*p - value));
    return;
  }
  nearest = rest = Vec<A>{};
  for (int i = 0; i < rows; ++i) nearest[i] = static_cast<A>(p[i]), rest[i] = static_cast<A>(p[i] - nearest[i]);
}
template <class A, int kMode, class Out>
inline void put_sum(Out* p, int rows, const Sum<A>& sum) {
  if (kMode == kPositionsInLanes)
    *p = static_cast<Out>(sum_of_lanes<A>(sum.total));
  else
    for (int i = 0; i < rows; ++i) p[i] = static_cast<Out>(sum.total[i]);
}
template <class A>
inline void put_mean(A* mean, A* mean_lo, A centre, double shift) {
  const double whole = centre + shift;
  *mean = static_cast<A>(whole);
  *mean_lo = static_cast<A>(whole - *mean);
}

// A value near the mean, so that centred sums do not cancel: each lane's median of the registers at the start, in the
// middle and at the end of the strip, which is robust against one outlier, then the mean over lanes that are positions.
// The centre of a constant row is exactly its value.
template <class A, class T, int kMode>
inline Vec<A> centre_of(const Strip& x, int rows) {
  constexpr int64_t width = kMode == kPositionsInLanes ? lanes_of<A> : 1;
  const int count = kMode == kChannelsInLanes ? rows : static_cast<int>(x.length < width ? x.length : width);
  const int64_t last = x.length < width ? 0 : x.length - width;
  const auto load = [&](const T* p) { return count == lanes_of<A> ? widen(p) : widen_part<A>(p, count); };
  const Vec<A> start = load(at<T>(x, 0, 0)), middle = load(at<T>(x, x.segments / 2, last / 2));
  const Vec<A> end = load(at<T>(x, x.segments - 1, last));
  const Vec<A> low = min<A>(start, middle), high = max<A>(start, middle);
  const Vec<A> median = max<A>(low, min<A>(high, end));
  if (kMode == kChannelsInLanes) return median;
  double away = 0;
  for (int i = 1; i < count; ++i) away += static_cast<double>(median[i]) - median[0];
  return broadcast<A>(static_cast<A>(median[0] + away / count));
}

template <class A, class T, int kMode>
void moments(const Strip& x, int rows, Moments<A> out) {
  const Vec<A> centre = centre_of<A, T, kMode>(x, rows);
  const double count = static_cast<double>(x.segments * x.length);
  Sum<A> sum, square;
  const A lowest = -__builtin_huge_val();
  Vec<A> top = broadcast<A>(lowest);
  sweep<A, T, T, kMode>(
      x, x, rows, Nowhere{},
      [&](Vec<A> v, Vec<A>, auto mask) {
        const Vec<A> d = mask.keep(v - centre);
        sum.add(d);
        square.add(d * d);
        top = max<A>(mask.keep_or(v, top), top);
      },
      [&] { sum.flush(), square.flush(); });
  if (kMode == kPositionsInLanes) {
    const double total = sum_of_lanes<A>(sum.total), shift = total / count;
    put_mean<A>(out.mean, out.mean_lo, centre[0], shift);
    *out.m2 = static_cast<A>(sum_of_lanes<A>(square.total) - total * shift);
    *out.max = max_of_lanes<A>(top);
  } else {
    const WideVec<A> shift = sum.total / count;
    for (int i = 0; i < rows; ++i) put_mean<A>(out.mean + i, out.mean_lo + i, centre[i], shift[i]);
    narrow_part<A>(out.m2, narrowed<A>(square.total - sum.total * shift), rows);
    narrow_part<A>(out.max, top, rows);
  }
}

constexpr double kLog2E = 1.4426950408889634;

template <class A, class S, class T, int kMode>
void softmax(const Strip& s, const Strip& t, int rows, SoftmaxIn<A> in, SoftmaxOut out) {
  const Vec<A> k_s = per_row<A, kMode>(in.k_s, rows) * static_cast<A>(kLog2E), m_s = per_row<A, kMode>(in.m_s, rows);
  const Vec<A> k_t = per_row<A, kMode>(in.k_t, rows) * static_cast<A>(kLog2E), m_t = per_row<A, kMode>(in.m_t, rows);
  Sum<A> z_s, z_t, z_gap, es_s, et_s, et_log;
  sweep<A, S, T, kMode>(
      s, t, rows, Nowhere{},
      [&](Vec<A> x, Vec<A> y, auto mask) {
        const Vec<A> d_s = mask.keep(x - m_s), d_t = mask.keep(y - m_t);
        const Vec<A> y_s = k_s * d_s, y_t = k_t * d_t;
        const Vec<A> e_s = mask.keep(exp2_nonpositive(y_s)), e_t = mask.keep(exp2_nonpositive(y_t));
        z_s.add(e_s);
        z_t.add(e_t);
        z_gap.add(e_s - e_t);
        es_s.add(e_s * d_s);
        et_s.add(e_t * d_s);
        et_log.add(e_t * (y_t - y_s));
      },
      [&] { z_s.flush(), z_t.flush(), z_gap.flush(), es_s.flush(), et_s.flush(), et_log.flush(); });
  put_sum<A, kMode>(out.z_s, rows, z_s);
  put_sum<A, kMode>(out.z_t, rows, z_t);
  put_sum<A, kMode>(out.z_gap, rows, z_gap);
  put_sum<A, kMode>(out.es_s, rows, es_s);
  put_sum<A, kMode>(out.et_s, rows, et_s);
  put_sum<A, kMode>(out.et_log, rows, et_log);
}

template <class A, class S, class T, int kMode>
void gradient(const Strip& s, const Strip& t, const Strip& ds, int rows, GradientIn<A> in) {
  const Vec<A> k_s = per_row<A, kMode>(in.k_s, rows) * static_cast<A>(kLog2E), m_s = per_row<A, kMode>(in.m_s, rows);
  const Vec<A> k_t = per_row<A, kMode>(in.k_t, rows) * static_cast<A>(kLog2E), m_t = per_row<A, kMode>(in.m_t, rows);
  const Vec<A> a = per_row<A, kMode>(in.a, rows), b = per_row<A, kMode>(in.b, rows);
  const auto distance = [&](Vec<A> x, Vec<A> y) {
    const Vec<A> e_s = exp2_nonpositive(k_s * (x - m_s)), e_t = exp2_nonpositive(k_t * (y - m_t));
    return rounded(a * e_s) - rounded(b * e_t);
  };
  if (in.slope == nullptr) {
    sweep<A, S, T, kMode>(
        s, t, rows, Into<A, S>{ds}, [&](Vec<A> x, Vec<A> y, auto) { return distance(x, y); }, [] {});
    return;
  }
  const Vec<A> slope = per_row<A, kMode>(in.slope, rows), mean = per_row<A, kMode>(in.mean, rows);
  const Vec<A> rest = slope * per_row<A, kMode>(in.mean_lo, rows);
  sweep<A, S, T, kMode>(
      s, t, rows, Into<A, S>{ds},
      [&](Vec<A> x, Vec<A> y, auto) { return distance(x, y) - (slope * (x - mean) - rest); }, [] {});
}

template <class A, class S, class T, int kMode>
void co_moments(const Strip& s, const Strip& t, int rows, CoMoments out) {
  const Vec<A> c_s = centre_of<A, S, kMode>(s, rows), c_t = centre_of<A, T, kMode>(t, rows);
  const double count = static_cast<double>(s.segments * s.length);
  Sum<A> sum_s, sum_t, ss, tt, st, dd;
  sweep<A, S, T, kMode>(
      s, t, rows, Nowhere{},
      [&](Vec<A> x, Vec<A> y, auto mask) {
        const Vec<A> d_s = mask.keep(x - c_s), d_t = mask.keep(y - c_t), d = d_s - d_t;
        sum_s.add(d_s);
        sum_t.add(d_t);
        ss.add(d_s * d_s);
        tt.add(d_t * d_t);
        st.add(d_s * d_t);
        dd.add(d * d);
      },
      [&] { sum_s.flush(), sum_t.flush(), ss.flush(), tt.flush(), st.flush(), dd.flush(); });
  if (kMode == kPositionsInLanes) {
    const double total_s = sum_of_lanes<A>(sum_s.total), total_t = sum_of_lanes<A>(sum_t.total);
    const double total_d = total_s - total_t;
    *out.mean_s = c_s[0] + total_s / count, *out.mean_t = c_t[0] + total_t / count;
    *out.ss = sum_of_lanes<A>(ss.total) - total_s * total_s / count;
    *out.tt = sum_of_lanes<A>(tt.total) - total_t * total_t / count;
    *out.st = sum_of_lanes<A>(st.total) - total_s * total_t / count;
    *out.dd = sum_of_lanes<A>(dd.total) - total_d * total_d / count;
  } else {
    const WideVec<A> shift_s = sum_s.total / count, shift_t = sum_t.total / count;
    const WideVec<A> sum_d = sum_s.total - sum_t.total;
    const WideVec<A> centred_ss = ss.total - sum_s.total * shift_s, centred_tt = tt.total - sum_t.total * shift_t;
    const WideVec<A> centred_st = st.total - sum_s.total * shift_t, centred_dd = dd.total - sum_d * (shift_s - shift_t);
    for (int i = 0; i < rows; ++i) {
      out.mean_s[i] = c_s[i] + shift_s[i], out.mean_t[i] = c_t[i] + shift_t[i];
      out.ss[i] = centred_ss[i], out.tt[i] = centred_tt[i], out.st[i] = centred_st[i], out.dd[i] = centred_dd[i];
    }
  }
}

template <class A, class S, class T, int kMode>
void affine(const Strip& s, const Strip& t, const Strip& ds, int rows, AffineIn in) {
  Vec<A> alpha, beta, mean_s, mean_t, mean_s_lo, mean_t_lo, unused;
  per_row_in_two<A, kMode>(in.alpha, rows, alpha, unused), per_row_in_two<A, kMode>(in.beta, rows, beta, unused);
  per_row_in_two<A, kMode>(in.mean_s, rows, mean_s, mean_s_lo);
  per_row_in_two<A, kMode>(in.mean_t, rows, mean_t, mean_t_lo);
  const Vec<A> rest = rounded(alpha * mean_s_lo) - rounded(beta * mean_t_lo);
  sweep<A, S, T, kMode>(
      s, t, rows, Into<A, S>{ds},
      [&](Vec<A> x, Vec<A> y, auto) { return rounded(alpha * (x - mean_s)) - rounded(beta * (y - mean_t)) - rest; },
      [] {});
}

template <class A, class S, class T, int kMode>
void difference(const Strip& s, const Strip& t, const Strip& ds, int rows, A factor, A* out) {
  Sum<A> square;
  const auto body = [&](Vec<A> x, Vec<A> y, auto mask) {
    const Vec<A> d = mask.keep(x - y);
    square.add(d * d);
    return d * factor;
  };
  const auto flush = [&] { square.flush(); };
  if (ds.data)
    sweep<A, S, T, kMode>(s, t, rows, Into<A, S>{ds}, body, flush);
  else
    sweep<A, S, T, kMode>(s, t, rows, Nowhere{}, body, flush);
  if (out) put_sum<A, kMode>(out, rows, square);
}

template <class A, class T>
void scale(const void* in, void* out, int64_t count, A factor) {
  const T* from = static_cast<const T*>(in);
  T* to = static_cast<T*>(out);
  int64_t i = 0;
  for (; i + lanes_of<A> <= count; i += lanes_of<A>) narrow(to + i, widen(from + i) * factor);
  if (const int rest = static_cast<int>(count - i)) narrow_part<A>(to + i, widen_part<A>(from + i, rest) * factor, rest);
}

// ---- the table ---------------------------------------------------------------------------------------------------
template <class A, class S, class T>
void enter_pair(Kernels<A>& k, Dtype s, Dtype t) {
  k.softmax[s][t][0] = softmax<A, S, T, 0>, k.softmax[s][t][1] = softmax<A, S, T, 1>;
  k.gradient[s][t][0] = gradient<A, S, T, 0>, k.gradient[s][t][1] = gradient<A, S, T, 1>;
  k.co_moments[s][t][0] = co_moments<A, S, T, 0>, k.co_moments[s][t][1] = co_moments<A, S, T, 1>;
  k.affine[s][t][0] = affine<A, S, T, 0>, k.affine[s][t][1] = affine<A, S, T, 1>;
  k.difference[s][t][0] = difference<A, S, T, 0>, k.difference[s][t][1] = difference<A, S, T, 1>;
}

template <class A, class T>
void enter_single(Kernels<A>& k, Dtype t) {
  k.moments[t][0] = moments<A, T, 0>, k.moments[t][1] = moments<A, T, 1>;
  k.scale[t] = scale<A, T>;
}

template <class S>
void enter_teachers(Kernels<float>& k, Dtype s) {
  enter_single<float, S>(k, s);
  enter_pair<float, S, float>(k, s, kFloat32);
  enter_pair<float, S, BFloat16>(k, s, kBFloat16);
  enter_pair<float, S, Float16>(k, s, kFloat16);
}

Kernels<float> float_kernels(const char* name) {
  Kernels<float> k{};
  enter_teachers<float>(k, kFloat32);
  enter_teachers<BFloat16>(k, kBFloat16);
  enter_teachers<Float16>(k, kFloat16);
  k.gather = gather_kernels();
  k.lanes = lanes_of<float>, k.name = name;
  return k;
}

Kernels<double> double_kernels(const char* name) {
  Kernels<double> k{};
  enter_single<double, double>(k, kFloat64);
  enter_pair<double, double, double>(k, kFloat64, kFloat64);
  k.lanes = lanes_of<double>, k.name = name;
  return k;
}
