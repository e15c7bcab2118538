// Matrix products with gathered rows, for a convolution over a subset of the positions.
#pragma once

#include <cstdint>

namespace kdops {

// out[r][0..panel) (+)= sum over taps k and i < inner of in[k*rows + r][i] * weight[(k*inner + i)*panel ..].
// panel is two registers of floats.
struct RowsTimesPanel {
  const float* const* in;  // [taps][rows]
  const float* weight;     // [taps][inner][panel]
  float* const* out;       // [rows]
  int taps, rows;          // rows: at most kMostRows
  int64_t inner;
};
constexpr int kMostRows = 8;

// out[i*stride .. + panel) += sum over k < count of left[k][i] * right[k][0..panel), for i < kMostRows.
struct OuterProducts {
  const float* const* left;
  const float* const* right;
  int64_t left_offset, right_offset;  // added to every address
  int64_t count;
  float* out;
  int64_t stride;
};

struct GatherKernels {
  void (*rows_times_panel)(const RowsTimesPanel& job);      // out is overwritten
  void (*add_rows_times_panel)(const RowsTimesPanel& job);  // out is added to
  void (*add_outer_products)(const OuterProducts& job);
  int panel;
};

}  // namespace kdops
