// The first convolution of MGD's generator on the kept positions only: fp32, by matrix products of gathered rows.
//
// A masked map is stored as its kept rows, Tensor[K, C], for the K kept positions in order. A 3x3 convolution with
// padding 1 adds, for each of its nine taps d, the product of row p and the tap's C x C matrix to the output position
// q = p - d; both gradients run over the same pairs (p, q). So all three cost 1 - lambda of the dense convolution. Maps
// are channels_last, widths multiples of 32. Every sum runs in a fixed order: a task owns its outputs.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "strip.h"

namespace kdops {
namespace {

constexpr int kTaps = 9;
constexpr int64_t kRowsOfTask = 64;
constexpr int64_t kRowsOfPiece = 32;

// The kept positions of a mask, image by image.
struct Kept {
  int64_t batch, height, width;
  std::vector<int64_t> position;  // n*H*W + h*W + w
  std::vector<int64_t> start;     // of each image in `position`, then the end

  explicit Kept(const at::Tensor& keep) : batch(keep.size(0)), height(keep.size(2)), width(keep.size(3)) {
    const at::Tensor dense = keep.contiguous();
    const bool* kept = dense.data_ptr<bool>();
    const int64_t positions = height * width;
    for (int64_t n = 0; n < batch; ++n) {
      start.push_back(size());
      for (int64_t p = n * positions; p < (n + 1) * positions; ++p)
        if (kept[p]) position.push_back(p);
    }
    start.push_back(size());
  }
  int64_t size() const { return static_cast<int64_t>(position.size()); }
};

// The output position of each kept row for each tap, or -1 if it is outside the map: [tap][row].
std::vector<int64_t> targets_of(const Kept& kept) {
  std::vector<int64_t> targets(kTaps * kept.size());
  for (int64_t i = 0; i < kept.size(); ++i) {
    const int64_t p = kept.position[i], h = p / kept.width % kept.height, w = p % kept.width;
    for (int tap = 0; tap < kTaps; ++tap) {
      const int64_t dh = tap / 3 - 1, dw = tap % 3 - 1;
      const bool inside = h >= dh && h - dh < kept.height && w >= dw && w - dw < kept.width;
      targets[tap * kept.size() + i] = inside ? p - dh * kept.width - dw : -1;
    }
  }
  return targets;
}

const GatherKernels& gather() { return kernels<float>().gather; }

// ---- rows and maps -----------------------------------------------------------------------------------------------
// visit(n, i_begin, i_end) over pieces of rows of one image.
template <class Visit>
void over_pieces(const Kept& kept, Visit&& visit) {
  std::vector<int64_t> begin, image;
  for (int64_t n = 0; n < kept.batch; ++n)
    for (int64_t i = kept.start[n]; i < kept.start[n + 1]; i += kRowsOfTask) begin.push_back(i), image.push_back(n);
  at::parallel_for(0, static_cast<int64_t>(begin.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j)
      visit(image[j], begin[j], std::min(begin[j] + kRowsOfTask, kept.start[image[j] + 1]));
  });
}

// Calls move(row element, map element) for every channel of every kept position; channels are the inner loop if they
// are contiguous in the map, else rows.
template <class Move>
void move_rows(const Kept& kept, const at::Tensor& rows, const at::Tensor& map, Move&& move) {
  float* const row = rows.data_ptr<float>();
  float* const data = map.data_ptr<float>();
  const int64_t channels = map.size(1), positions = kept.height * kept.width, stride_c = map.stride(1);
  const int64_t stride_n = map.stride(0), stride_h = map.stride(2), stride_w = map.stride(3);
  const auto place = [&](int64_t i, int64_t n) {
    const int64_t p = kept.position[i] % positions;
    return data + n * stride_n + p / kept.width * stride_h + p % kept.width * stride_w;
  };
  over_pieces(kept, [&](int64_t n, int64_t begin, int64_t end) {
    float* places[kRowsOfTask];
    for (int64_t i = begin; i < end; ++i) places[i - begin] = place(i, n);
    if (stride_c == 1) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t c = 0; c < channels; ++c) move(row[i * channels + c], places[i - begin][c]);
      return;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = begin; i < end; ++i) move(row[i * channels + c], places[i - begin][c * stride_c]);
  });
}

at::Tensor compact(const at::Tensor& map, const at::Tensor& keep) {
  const Kept kept(keep);
  at::Tensor rows = at::empty({kept.size(), map.size(1)}, map.options());
  move_rows(kept, rows, map, [](float& row, float& place) { row = place; });
  return rows;
}

void expand_(const at::Tensor& map, const at::Tensor& rows, const at::Tensor& keep) {
  map.zero_();
  move_rows(Kept(keep), rows, map, [](float& row, float& place) { place = row; });
}

// ---- the convolution ---------------------------------------------------------------------------------------------
// Weight[co, ci, 3, 3] as [panels][tap][inner][panel]: the columns of a panel are output channels for the forward and
// input channels for the gradient of the input.
at::Tensor packed(const at::Tensor& weight, bool forward) {
  const at::Tensor taps = forward ? weight.permute({2, 3, 1, 0}) : weight.permute({2, 3, 0, 1});
  const int64_t inner = taps.size(2), outer = taps.size(3), panel = gather().panel;
  return taps.reshape({kTaps, inner, outer / panel, panel}).permute({2, 0, 1, 3}).contiguous();
}

at::Tensor channels_last(const Kept& kept, int64_t channels, const at::Tensor& like) {
  return at::empty({kept.batch, channels, kept.height, kept.width},
                   like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// Copy a contiguous panel of an image to its columns of the map, through the ReLU.
void relu_to(const float* from, float* out, int64_t positions, int64_t stride, int panel) {
  for (int64_t p = 0; p < positions; ++p, from += panel, out += stride)
    for (int i = 0; i < panel; ++i) out[i] = from[i] < 0 ? 0 : from[i];  // NaN stays
}

// relu(conv(map) + bias), for the map with kept positions `rows`.
at::Tensor forward(const at::Tensor& rows, const at::Tensor& keep, const at::Tensor& weight, const at::Tensor& bias) {
  const Kept kept(keep);
  const std::vector<int64_t> reached = targets_of(kept);
  const int64_t inner = rows.size(1), outer = weight.size(0), positions = kept.height * kept.width;
  const int panel = gather().panel;
  const at::Tensor panels = packed(weight, true), out = channels_last(kept, outer, rows), start = bias.contiguous();
  const float* const in = rows.data_ptr<float>();
  const float* const w = panels.data_ptr<float>();
  const float* const b = start.data_ptr<float>();
  float* const to = out.data_ptr<float>();

  // A task owns one panel of one image, which stays in the cache from the bias to the ReLU.
  const int64_t per_image = outer / panel;
  at::parallel_for(0, kept.batch * per_image, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> image(positions * panel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / per_image, column = task % per_image * panel;
      for (int64_t p = 0; p < positions; ++p) std::memcpy(&image[p * panel], b + column, panel * sizeof(float));
      for (int tap = 0; tap < kTaps; ++tap) {
        const float* sources[kMostRows];
        float* targets[kMostRows];
        int count = 0;
        const float* tap_weight = w + (column / panel * kTaps + tap) * inner * panel;
        const auto run = [&] {
          if (count) gather().add_rows_times_panel({sources, tap_weight, targets, 1, count, inner});
          count = 0;
        };
        for (int64_t i = kept.start[n]; i < kept.start[n + 1]; ++i) {
          const int64_t q = reached[tap * kept.size() + i];
          if (q < 0) continue;
          sources[count] = in + i * inner, targets[count] = &image[(q - n * positions) * panel];
          if (++count == kMostRows) run();
        }
        run();
      }
      relu_to(image.data(), to + n * positions * outer + column, positions, outer, panel);
    }
  });
  return out;
}

at::Tensor input_gradient(const Kept& kept, const std::vector<int64_t>& reached, const at::Tensor& grad, const
at::Tensor& weight) {
  const int64_t inner = weight.size(0), outer = weight.size(1);
  const int panel = gather().panel;
  const at::Tensor panels = packed(weight, false), out = at::empty({kept.size(), outer}, grad.options());
  const std::vector<float> nothing(inner, 0.0f);  // positions outside the map
  const float* const in = grad.data_ptr<float>();
  const float* const w = panels.data_ptr<float>();
  float* const to = out.data_ptr<float>();
  over_pieces(kept, [&](int64_t, int64_t begin, int64_t end) {
    const float* sources[kRowsOfTask / kMostRows][kTaps * kMostRows];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = (i - begin) / kMostRows, first = begin + block * kMostRows;
      const int rows = static_cast<int>(std::min<int64_t>(kMostRows, end - first));
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t q = reached[tap * kept.size() + i];
        sources[block][tap * rows + (i - first)] = q < 0 ? nothing.data() : in + q * inner;
      }
    }
    for (int64_t column = 0; column < outer; column += panel) {
      for (int64_t first = begin; first < end; first += kMostRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kMostRows, end - first));
        float* targets[kMostRows];
        for (int r = 0; r < rows; ++r) targets[r] = to + (first + r) * outer + column;
        gather().rows_times_panel(
            {sources[(first - begin) / kMostRows], w + column * kTaps * inner, targets, kTaps, rows, inner});
      }
    }
  });
  return out;
}

at::Tensor weight_gradient(const Kept& kept, const std::vector<int64_t>& reached, const at::Tensor& grad, const
at::Tensor& rows) {
  const int64_t inner = rows.size(1), outer = grad.size(1);
  const int panel = gather().panel;
  const at::Tensor taps = at::zeros({kTaps, inner, outer}, rows.options());
  const float* const left = rows.data_ptr<float>();
  const float* const right = grad.data_ptr<float>();
  float* const to = taps.data_ptr<float>();

  // A task owns one panel of one tap. A thread processes its tasks image by image, so that the image stays in the
  // cache, and rows piece by piece, so that a piece stays in L1 for all tiles.
  const int64_t per_tap = outer / panel;
  const auto add_image = [&](int64_t n, int tap, int64_t column) {
    const float *lefts[kRowsOfPiece], *rights[kRowsOfPiece];
    int64_t count = 0;
    const auto run = [&] {
      for (int64_t i = 0; count && i < inner; i += kMostRows)
        gather().add_outer_products({lefts, rights, i, column, count, to + (tap * inner + i) * outer + column, outer});
      count = 0;
    };
    for (int64_t i = kept.start[n]; i < kept.start[n + 1]; ++i) {
      const int64_t q = reached[tap * kept.size() + i];
      if (q < 0) continue;
      lefts[count] = left + i * inner, rights[count] = right + q * outer;
      if (++count == kRowsOfPiece) run();
    }
    run();
  };
  at::parallel_for(0, kTaps * per_tap, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < kept.batch; ++n)
      for (int64_t task = begin; task < end; ++task)
        add_image(n, static_cast<int>(task / per_tap), task % per_tap * panel);
  });
  return taps.view({3, 3, inner, outer}).permute({3, 2, 0, 1}).contiguous();
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& rows, const at::Tensor& keep,
                                            const at::Tensor& weight, bool want_rows, bool want_weight) {
  const Kept kept(keep);
  const std::vector<int64_t> reached = targets_of(kept);
  const at::Tensor dense = grad.contiguous(at::MemoryFormat::ChannelsLast);
  return {want_rows ? input_gradient(kept, reached, dense, weight) : at::Tensor(),
          want_weight ? weight_gradient(kept, reached, dense, rows) : at::Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("mgd_compact", compact);
  m.impl("mgd_expand_", expand_);
  m.impl("mgd_masked_conv", forward);
  m.impl("mgd_masked_conv_backward", backward);
}

}  // namespace kdops
