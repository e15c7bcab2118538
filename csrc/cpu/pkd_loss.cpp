// PKD on the CPU: co-moments and gradient of a channel while its maps are in the cache.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <utility>

#include "problem.h"

namespace kdops {
namespace {

// Fields of the statistics saved for backward, one value a channel. docs/design/notation.md has their formulas.
enum Stat { kMeanS, kRS, kMeanT, kRT, kQS, kDot, kMeanSLo, kMeanTLo, kStats };
enum ChannelWork { kValue = kStats, kChannelFields };
// What a row needs between the passes.
enum RowWork {
  kRowMeanS,
  kRowMeanT,
  kRowSS,
  kRowTT,
  kRowST,
  kRowDD,
  kRowFields,
  kAlpha = kRowSS,  // for the gradient, which no longer needs the sums
  kBeta = kRowTT,
};

struct Options {
  int64_t norm;
  double eps, weight;
  int64_t reduction;

  // Factor of a level's channels in the loss.
  double channel_weight(const Level& level) const { return reduction == kMean ? 1.0 / level.channels : 1.0; }
};

template <class A>
class Pkd {
 public:
  Pkd(const Problem& problem, Options options, A* channel_fields, double* row_fields)
      : p_(problem), o_(options), channel_fields_(channel_fields), row_fields_(row_fields) {}

  std::vector<Pass> statistics() const {
    return {{unit(&Pkd::co_moments), nullptr}, {nullptr, group(&Pkd::merge)}};
  }
  std::vector<Pass> gradients() const {
    return {{nullptr, group(&Pkd::coefficients)}, {unit(&Pkd::gradient), nullptr}};
  }
  void set_grad_output(GradOutput<A> grad_output) { grad_output_ = grad_output; }

  at::Tensor loss(at::TensorOptions tensor_options) const {
    if (o_.reduction == kNone) {
      at::Tensor out = at::empty({p_.channels}, tensor_options);
      std::copy_n(channel(kValue), p_.channels, out.data_ptr<A>());
      return out;
    }
    double total = 0;
    for (const auto& level : p_.levels) {
      double sum = 0;
      for (int64_t c = 0; c < level.channels; ++c) sum += *channel(kValue, level.first_channel + c);
      total += o_.channel_weight(level) * sum;
    }
    return at::scalar_tensor(total, tensor_options);
  }

 private:
  A* channel(int f, int64_t c = 0) const { return channel_fields_ + f * p_.channels + c; }
  double* field(int f, int64_t row) const { return row_fields_ + f * p_.rows + row; }
  auto unit(void (Pkd::*pass)(const Level&, int64_t, int64_t) const) const {
    return [this, pass](const Level& level, int64_t n, int64_t block) { (this->*pass)(level, n, block); };
  }
  auto group(void (Pkd::*pass)(const Level&, int64_t, int64_t) const) const {
    return [this, pass](const Level& level, int64_t block) {
      for (int r = 0; r < level.rows(block); ++r)
        (this->*pass)(level, level.row(0, block) + r, level.channel(block) + r);
    };
  }

  void co_moments(const Level& level, int64_t n, int64_t block) const {
    const int64_t row = level.row(n, block);
    kernels<A>().co_moments[level.student_dtype()][level.teacher_dtype()][level.mode](
        level.strip(level.student, n, block), level.strip(level.teacher, n, block), level.rows(block),
        {field(kRowMeanS, row), field(kRowMeanT, row), field(kRowSS, row), field(kRowTT, row), field(kRowST, row),
         field(kRowDD, row)});
  }

  // Chan's formula over the rows of channel `c`, the first of which is `row`.
  void merge(const Level& level, int64_t row, int64_t c) const {
    const double batch = level.batch, count = batch * level.positions;
    // Relative to the first row's mean, so that the mean of a constant channel is exactly its value.
    const double first_s = *field(kRowMeanS, row), first_t = *field(kRowMeanT, row);
    double mean_s = first_s, mean_t = first_t, ss = 0, tt = 0, st = 0, dd = 0;
    const auto each = [&](auto&& visit) {
      for (int64_t n = 0; n < level.batch; ++n) visit(row + n * level.channels);
    };
    each([&](int64_t r) {
      mean_s += (*field(kRowMeanS, r) - first_s) / batch, mean_t += (*field(kRowMeanT, r) - first_t) / batch;
    });
    each([&](int64_t r) {
      const double away_s = *field(kRowMeanS, r) - mean_s, away_t = *field(kRowMeanT, r) - mean_t;
      const double away = away_s - away_t;
      ss += *field(kRowSS, r) + away_s * away_s * level.positions;
      tt += *field(kRowTT, r) + away_t * away_t * level.positions;
      st += *field(kRowST, r) + away_s * away_t * level.positions;
      dd += *field(kRowDD, r) + away * away * level.positions;
    });
    const Scale s = channel_scale(o_.norm, o_.eps, ss, count), t = channel_scale(o_.norm, o_.eps, tt, count);
    *channel(kMeanS, c) = static_cast<A>(mean_s), *channel(kMeanT, c) = static_cast<A>(mean_t);
    *channel(kMeanSLo, c) = static_cast<A>(mean_s - *channel(kMeanS, c));
    *channel(kMeanTLo, c) = static_cast<A>(mean_t - *channel(kMeanT, c));
    *channel(kRS, c) = static_cast<A>(s.r), *channel(kRT, c) = static_cast<A>(t.r);
    *channel(kQS, c) = static_cast<A>(s.q);
    const auto [distance, dot] = distance_of(s.r, t.r, ss, tt, st, dd);
    *channel(kDot, c) = static_cast<A>(dot);
    // Rounding may make a vanishing distance negative; NaN stays.
    *channel(kValue, c) = static_cast<A>(o_.weight / (2 * count) * (distance < 0 ? 0 : distance));
  }

  // r_S^2 SS + r_T^2 TT - 2 r_S r_T ST, and r_S^2 SS - r_S r_T ST. These forms cancel when the student is close to the
  // teacher; those with DD do not, but they cancel where the maps differ in scale.
  static std::pair<double, double> distance_of(double r_s, double r_t, double ss, double tt, double st, double dd) {
    if (r_s < 4 * r_t && r_t < 4 * r_s) {
      const double surplus = r_s * ss - r_t * tt;
      return {(r_s - r_t) * surplus + r_s * r_t * dd, 0.5 * r_s * ((r_s - r_t) * ss + surplus + r_t * dd)};
    }
    const double s_part = r_s * ss - r_t * st, t_part = r_t * tt - r_s * st;
    return {r_s * s_part + r_t * t_part, r_s * s_part};
  }

  void coefficients(const Level& level, int64_t row, int64_t c) const {
    const double count = static_cast<double>(level.batch * level.positions);
    const double r_s = *channel(kRS, c), r_t = *channel(kRT, c);
    const double g = grad_output_(c) * o_.channel_weight(level) * o_.weight / count;
    const double alpha = r_s * g * (r_s - *channel(kQS, c) * *channel(kDot, c)), beta = r_s * g * r_t;
    const double mean_s = *channel(kMeanS, c) + static_cast<double>(*channel(kMeanSLo, c));
    const double mean_t = *channel(kMeanT, c) + static_cast<double>(*channel(kMeanTLo, c));
    for (int64_t n = 0; n < level.batch; ++n, row += level.channels) {
      *field(kAlpha, row) = alpha, *field(kBeta, row) = beta;
      *field(kRowMeanS, row) = mean_s, *field(kRowMeanT, row) = mean_t;
    }
  }

  void gradient(const Level& level, int64_t n, int64_t block) const {
    const int64_t row = level.row(n, block);
    kernels<A>().affine[level.student_dtype()][level.teacher_dtype()][level.mode](
        level.strip(level.student, n, block), level.strip(level.teacher, n, block),
        level.strip(level.grad_in_place, n, block), level.rows(block),
        {field(kAlpha, row), field(kRowMeanS, row), field(kBeta, row), field(kRowMeanT, row)});
  }

  const Problem& p_;
  const Options o_;
  A* const channel_fields_;
  double* const row_fields_;
  GradOutput<A> grad_output_;
};

template <class A>
Outputs forward_in(at::TensorList student, at::TensorList teacher, Options options, int64_t save) {
  const Problem problem(student, teacher, kernels<A>().lanes, save & kSaveGrads);
  const auto tensor_options = student[0].options().dtype(c10::CppTypeToScalarType<A>::value);
  const at::Tensor channels = at::empty({kChannelFields, problem.channels}, tensor_options);
  const at::Tensor rows = at::empty({kRowFields, problem.rows}, tensor_options.dtype(at::kDouble));
  const Pkd<A> pkd(problem, options, channels.data_ptr<A>(), rows.data_ptr<double>());
  auto passes = pkd.statistics();
  std::vector<at::Tensor> grads;
  if (save & kSaveGrads)
    for (auto& pass : pkd.gradients()) passes.push_back(pass);
  problem.run(passes);
  if (save & kSaveGrads) grads = problem.finished_grads();
  const at::Tensor stats = save & kSaveStats ? channels.narrow(0, 0, kStats).clone() : at::empty({0}, tensor_options);
  return {pkd.loss(tensor_options), stats, std::move(grads)};
}

template <class A>
std::vector<at::Tensor> backward_in(const at::Tensor& grad_output, at::TensorList student, at::TensorList teacher,
                                    const at::Tensor& stats, Options options) {
  const Problem problem(student, teacher, kernels<A>().lanes, true);
  const at::Tensor channels = stats.contiguous();
  const at::Tensor rows = at::empty({kRowFields, problem.rows}, stats.options().dtype(at::kDouble));
  Pkd<A> pkd(problem, options, channels.data_ptr<A>(), rows.data_ptr<double>());
  pkd.set_grad_output(GradOutput<A>(grad_output));
  problem.run(pkd.gradients());
  return problem.finished_grads();
}

Outputs forward(at::TensorList student, at::TensorList teacher, int64_t norm, double eps, double loss_weight,
                int64_t reduction, int64_t save) {
  const Options options{norm, eps, loss_weight, reduction};
  return in_accumulation_dtype(student, teacher, [&](auto a, at::TensorList s, at::TensorList t) {
    return forward_in<decltype(a)>(s, t, options, save);
  });
}

std::vector<at::Tensor> backward(const at::Tensor& grad_output, at::TensorList student, at::TensorList teacher,
                                 const at::Tensor& stats, int64_t norm, double eps, double loss_weight,
                                 int64_t reduction) {
  const Options options{norm, eps, loss_weight, reduction};
  return in_accumulation_dtype(student, teacher, [&](auto a, at::TensorList s, at::TensorList t) {
    return backward_in<decltype(a)>(grad_output, s, t, stats, options);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("pkd_loss", forward);
  m.impl("pkd_loss_backward", backward);
}

}  // namespace kdops
