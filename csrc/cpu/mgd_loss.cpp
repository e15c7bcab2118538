// MGD on the CPU, around its convolutions: the mask, the bits of the ReLU and the squared error.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>

#include "philox.h"
#include "problem.h"

namespace kdops {
namespace {

constexpr int64_t kGrain = 1 << 14;

// ---- the mask ----------------------------------------------------------------------------------------------------
at::Tensor mask(const at::Tensor& seed, int64_t threshold, at::IntArrayRef shape) {
  at::Tensor keep = at::empty(shape, seed.options().dtype(at::kBool));
  const auto key = static_cast<uint64_t>(*seed.data_ptr<int64_t>());
  bool* out = keep.data_ptr<bool>();
  at::parallel_for(0, keep.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = philox_word(key, static_cast<uint64_t>(i)) < threshold;
  });
  return keep;
}

// ---- the ReLU ----------------------------------------------------------------------------------------------------
// The backward of a ReLU needs one bit per element of its output, in memory order.
at::Tensor relu_bits(const at::Tensor& x) {
  const int64_t count = x.numel(), bytes = (count + 7) / 8;
  at::Tensor bits = at::empty({bytes}, x.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
  uint8_t* out = bits.data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "mgd_relu_bits", [&] {
    const scalar_t* in = x.data_ptr<scalar_t>();
    at::parallel_for(0, bytes, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int valid = static_cast<int>(std::min<int64_t>(8, count - 8 * i));
        unsigned byte = 0;
        for (int b = 0; b < valid; ++b) byte |= static_cast<unsigned>(!(in[8 * i + b] <= 0)) << b;  // NaN passes
        out[i] = static_cast<uint8_t>(byte);
      }
    });
  });
  return bits;
}

// Elements as integers of their size: compilers vectorize this loop.
template <class Word>
void clear_unset(void* data, const uint8_t* bits, int64_t count) {
  Word* out = static_cast<Word*>(data);
  const auto clear = [&](int64_t i, int n) {
    const unsigned byte = bits[i];
    for (int b = 0; b < n; ++b) out[8 * i + b] &= (byte & (1u << b)) ? static_cast<Word>(~Word{0}) : Word{0};
  };
  at::parallel_for(0, count / 8, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) clear(i, 8);
  });
  if (count % 8) clear(count / 8, static_cast<int>(count % 8));
}

void relu_backward_(const at::Tensor& grad, const at::Tensor& bits) {
  const auto clear = grad.element_size() == 2   ? clear_unset<uint16_t>
                     : grad.element_size() == 4 ? clear_unset<uint32_t>
                                                : clear_unset<uint64_t>;
  clear(grad.data_ptr(), bits.data_ptr<uint8_t>(), grad.numel());
}

// ---- the squared error -------------------------------------------------------------------------------------------
// Writes factor * (s - t) to `to`'s maps (the problem's gradients, the student itself, or nothing) and returns the sum
// of (s - t)^2 over each level.
enum class To { kNothing, kGrad, kStudent };

template <class A>
std::vector<double> difference(const Problem& problem, To to, const std::vector<double>& factors, bool want_sum) {
  std::vector<A> sums(want_sum ? problem.rows : 0);
  const Level* first = problem.levels.data();
  problem.run({{[&](const Level& level, int64_t n, int64_t block) {
                  Strip out{};
                  if (to != To::kNothing)
                    out = level.strip(to == To::kGrad ? level.grad_in_place : level.student, n, block);
                  kernels<A>().difference[level.student_dtype()][level.teacher_dtype()][level.mode](
                      level.strip(level.student, n, block), level.strip(level.teacher, n, block), out,
                      level.rows(block), static_cast<A>(factors[&level - first]),
                      want_sum ? sums.data() + level.row(n, block) : nullptr);
                },
                nullptr}});
  std::vector<double> totals;
  for (const auto& level : problem.levels) {
    double total = 0;
    for (int64_t r = 0; want_sum && r < level.batch * level.channels; ++r) total += sums[level.first_row + r];
    totals.push_back(total);
  }
  return totals;
}

std::vector<double> gradient_factors(const Problem& problem, double alpha) {
  std::vector<double> factors;
  for (const auto& level : problem.levels) factors.push_back(2 * alpha / level.batch);
  return factors;
}

Outputs forward(at::TensorList student, at::TensorList teacher, double alpha, int64_t, int64_t save) {
  return in_accumulation_dtype(student, teacher, [&](auto a, at::TensorList s, at::TensorList t) -> Outputs {
    using A = decltype(a);
    const Problem problem(s, t, kernels<A>().lanes, save & kSaveGrads);
    const auto sums = difference<A>(problem, save & kSaveGrads ? To::kGrad : To::kNothing,
                                    gradient_factors(problem, alpha), true);
    double loss = 0;
    for (size_t i = 0; i < sums.size(); ++i) loss += alpha / problem.levels[i].batch * sums[i];
    const auto options = s[0].options().dtype(c10::CppTypeToScalarType<A>::value);
    const std::array<int64_t, 2> none = {0, 0};
    return {at::scalar_tensor(loss, options), at::empty(at::IntArrayRef(none.data(), save & kSaveStats ? 2 : 1), options),
            save & kSaveGrads ? problem.finished_grads() : std::vector<at::Tensor>{}};
  });
}

std::vector<at::Tensor> backward(const at::Tensor& grad_output, at::TensorList student, at::TensorList teacher,
                                 const at::Tensor&, double alpha, int64_t) {
  return in_accumulation_dtype(student, teacher, [&](auto a, at::TensorList s, at::TensorList t) {
    using A = decltype(a);
    const Problem problem(s, t, kernels<A>().lanes, true);
    auto factors = gradient_factors(problem, alpha);
    for (auto& factor : factors) factor *= GradOutput<A>(grad_output)(0);
    difference<A>(problem, To::kGrad, factors, false);
    return problem.finished_grads();
  });
}

// generated = scale * (generated - teacher); returns the sum of the squares of the difference. Image by image if the
// teacher has another layout, so that only one image is copied to this one at a time.
template <class A>
double subtract(const at::Tensor& generated, const at::Tensor& teacher, double scale) {
  const auto same = [&](const at::Tensor& s, const at::Tensor& t) {
    return difference<A>(Problem({s}, {t}, kernels<A>().lanes, false), To::kStudent, {scale}, true)[0];
  };
  if (generated.suggest_memory_format() == teacher.suggest_memory_format()) return same(generated, teacher);
  double total = 0;
  for (int64_t n = 0; n < generated.size(0); ++n) total += same(generated.narrow(0, n, 1), teacher.narrow(0, n, 1));
  return total;
}

at::Tensor difference_(const at::Tensor& generated, const std::optional<at::Tensor>& bias, const at::Tensor& teacher,
                       double scale) {
  if (bias) generated.add_(bias->view({1, -1, 1, 1}));
  const bool wide = generated.scalar_type() == at::kDouble;
  const auto options = generated.options().dtype(wide ? at::kDouble : at::kFloat);
  if (wide) return at::scalar_tensor(subtract<double>(generated, teacher.to(at::kDouble), scale), options);
  return at::scalar_tensor(subtract<float>(generated, teacher, scale), options);
}

}  // namespace

TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("mgd_loss", forward);
  m.impl("mgd_loss_backward", backward);
  m.impl("mgd_mask", mask);
  m.impl("mgd_relu_bits", relu_bits);
  m.impl("mgd_relu_backward_", relu_backward_);
  m.impl("mgd_difference_", difference_);
}

}  // namespace kdops
