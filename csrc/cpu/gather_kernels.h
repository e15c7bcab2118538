// The products of gather.h on registers. Included once per instruction set, after vec.h.
//
// A tile is some rows by two registers of columns, accumulated in registers. Rows are processed 8 at a time (4 where
// there are only 16 registers), the remainder in smaller powers of two.

constexpr int kTileRows = kLanes == 16 ? 8 : 4;

template <int kRows, bool kAdd>
inline void product_tile(const RowsTimesPanel& job, int first) {
  Vec<float> low[kRows], high[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = Vec<float>{};
  const float* w = job.weight;
  for (int k = 0; k < job.taps; ++k) {
    const float* in[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) in[r] = job.in[k * job.rows + first + r];
    for (int64_t i = 0; i < job.inner; ++i, w += 2 * kLanes) {
      const Vec<float> w_low = widen(w), w_high = widen(w + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<float> x = broadcast<float>(in[r][i]);
        low[r] += x * w_low;
        high[r] += x * w_high;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* out = job.out[first + r];
    if (kAdd) low[r] += widen(out), high[r] += widen(out + kLanes);
    narrow(out, low[r]);
    narrow(out + kLanes, high[r]);
  }
}

template <bool kAdd>
void rows_times_panel(const RowsTimesPanel& job) {
  int first = 0;
  for (; first + kTileRows <= job.rows; first += kTileRows) product_tile<kTileRows, kAdd>(job, first);
  if (kTileRows > 4 && first + 4 <= job.rows) product_tile<4, kAdd>(job, first), first += 4;
  if (first + 2 <= job.rows) product_tile<2, kAdd>(job, first), first += 2;
  if (first < job.rows) product_tile<1, kAdd>(job, first);
}

template <int kRows>
inline void outer_tile(const OuterProducts& job, int first) {
  Vec<float> low[kRows], high[kRows];
  float* out = job.out + first * job.stride;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) low[r] = widen(out + r * job.stride), high[r] = widen(out + r * job.stride + kLanes);
  for (int64_t k = 0; k < job.count; ++k) {
    const float* left = job.left[k] + job.left_offset + first;
    const float* right = job.right[k] + job.right_offset;
    const Vec<float> y_low = widen(right), y_high = widen(right + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<float> x = broadcast<float>(left[r]);
      low[r] += x * y_low;
      high[r] += x * y_high;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    narrow(out + r * job.stride, low[r]);
    narrow(out + r * job.stride + kLanes, high[r]);
  }
}

void add_outer_products(const OuterProducts& job) {
  for (int first = 0; first < kMostRows; first += kTileRows) outer_tile<kTileRows>(job, first);
}

constexpr GatherKernels gather_kernels() {
  return {rows_times_panel<false>, rows_times_panel<true>, add_outer_products, 2 * kLanes};
}
