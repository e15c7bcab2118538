// CWD on the CPU: moments, softmax sums and gradient of a channel while its maps are in the cache.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "problem.h"

namespace kdops {
namespace {

// Fields of the statistics saved for backward, one value a row. docs/design/notation.md has their formulas.
enum Stat { kMeanS, kRS, kRT, kQS, kMaxS, kMaxT, kZS, kZT, kDot, kMeanSLo, kStats };
// What else a row needs between the passes.
enum Work { kMeanT = kStats, kMeanTLo, kM2S, kM2T, kKS, kKT, kA, kB, kSlope, kKl, kFields };

constexpr double kLn2 = 0.6931471805599453;
constexpr int kMostLanes = 16;  // of the widest register

struct Options {
  double tau;
  int64_t norm;
  double eps, weight;
  int64_t reduction;

  // Factor of a level's rows in the loss.
  double row_weight(const Level& level) const {
    const double scaling = reduction == kMean ? 1.0 / (level.batch * level.channels) : 1.0;
    return weight * tau * tau * scaling;
  }
};

template <class A>
class Cwd {
 public:
  Cwd(const Problem& problem, Options options, A* fields) : p_(problem), o_(options), fields_(fields) {}

  std::vector<Pass> statistics() const {
    return {{unit(&Cwd::moments), nullptr},
            {nullptr, group(&Cwd::merge)},
            {unit(&Cwd::softmax), nullptr}};
  }
  std::vector<Pass> gradients() const {
    return {{nullptr, group(&Cwd::coefficients)}, {unit(&Cwd::gradient), nullptr}};
  }
  void set_grad_output(GradOutput<A> grad_output) { grad_output_ = grad_output; }

  at::Tensor loss(at::TensorOptions tensor_options) const {
    at::Tensor out = at::empty(o_.reduction == kNone ? at::IntArrayRef{p_.rows} : at::IntArrayRef{}, tensor_options);
    A* values = out.data_ptr<A>();
    double total = 0;
    for (const auto& level : p_.levels) {
      double sum = 0;
      for (int64_t i = 0; i < level.batch * level.channels; ++i) {
        const double kl = field(kKl)[level.first_row + i];
        if (o_.reduction == kNone) values[level.first_row + i] = static_cast<A>(o_.row_weight(level) * kl);
        sum += kl;
      }
      total += o_.row_weight(level) * sum;
    }
    if (o_.reduction != kNone) *values = static_cast<A>(total);
    return out;
  }

 private:
  A* field(int f, int64_t row = 0) const { return fields_ + f * p_.rows + row; }
  auto unit(void (Cwd::*pass)(const Level&, int64_t, int64_t) const) const {
    return [this, pass](const Level& level, int64_t n, int64_t block) { (this->*pass)(level, n, block); };
  }
  auto group(void (Cwd::*pass)(const Level&, int64_t, int64_t) const) const {
    return [this, pass](const Level& level, int64_t block) {
      for (int r = 0; r < level.rows(block); ++r) (this->*pass)(level, level.row(0, block) + r, level.channels);
    };
  }

  void moments(const Level& level, int64_t n, int64_t block) const {
    const int64_t row = level.row(n, block);
    const auto& k = kernels<A>();
    k.moments[level.student_dtype()][level.mode](level.strip(level.student, n, block), level.rows(block),
                                                 {field(kMeanS, row), field(kMeanSLo, row), field(kM2S, row), field(kMaxS, row)});
    k.moments[level.teacher_dtype()][level.mode](level.strip(level.teacher, n, block), level.rows(block),
                                                 {field(kMeanT, row), field(kMeanTLo, row), field(kM2T, row), field(kMaxT, row)});
  }

  // The rows of a channel start at `row` and lie `stride` apart.
  void merge(const Level& level, int64_t row, int64_t stride) const {
    const Scale s = merged(level, row, stride, kMeanS, kMeanSLo, kM2S);
    const Scale t = merged(level, row, stride, kMeanT, kMeanTLo, kM2T);
    for (int64_t n = 0; n < level.batch; ++n, row += stride) {
      *field(kRS, row) = static_cast<A>(s.r), *field(kRT, row) = static_cast<A>(t.r);
      *field(kQS, row) = static_cast<A>(s.q);
      *field(kKS, row) = static_cast<A>(s.r / o_.tau), *field(kKT, row) = static_cast<A>(t.r / o_.tau);
    }
  }
  // Chan's formula over rows of equal length; leaves the channel's mean in its rows.
  Scale merged(const Level& level, int64_t row, int64_t stride, int mean_field, int lo_field, int m2_field) const {
    const auto row_mean = [&](int64_t r) { return static_cast<double>(*field(mean_field, r)) + *field(lo_field, r); };
    // Relative to the first row's mean, so that the mean of a constant channel is exactly its value.
    const double first = row_mean(row);
    double away_from_first = 0, m2 = 0;
    for (int64_t n = 1; n < level.batch; ++n) away_from_first += row_mean(row + n * stride) - first;
    const double mean = first + away_from_first / level.batch;
    for (int64_t n = 0; n < level.batch; ++n) {
      const double away = row_mean(row + n * stride) - mean;
      m2 += *field(m2_field, row + n * stride) + away * away * level.positions;
    }
    for (int64_t n = 0; n < level.batch; ++n) {
      const A nearest = static_cast<A>(mean);
      *field(mean_field, row + n * stride) = nearest;
      *field(lo_field, row + n * stride) = static_cast<A>(mean - nearest);
    }
    return channel_scale(o_.norm, o_.eps, m2, static_cast<double>(level.batch * level.positions));
  }

  void softmax(const Level& level, int64_t n, int64_t block) const {
    const int64_t row = level.row(n, block);
    const int rows = level.rows(block);
    double z_s[kMostLanes], z_t[kMostLanes], z_gap[kMostLanes], es_s[kMostLanes], et_s[kMostLanes], et_log[kMostLanes];
    kernels<A>().softmax[level.student_dtype()][level.teacher_dtype()][level.mode](
        level.strip_fetching(level.student, n, block), level.strip_fetching(level.teacher, n, block), rows,
        {field(kKS, row), field(kMaxS, row), field(kKT, row), field(kMaxT, row)},
        {z_s, z_t, z_gap, es_s, et_s, et_log});
    for (int i = 0; i < rows; ++i) {
      *field(kZS, row + i) = static_cast<A>(z_s[i]), *field(kZT, row + i) = static_cast<A>(z_t[i]);
      *field(kDot, row + i) = static_cast<A>(es_s[i] / z_s[i] - et_s[i] / z_t[i]);
      // Both terms, and their errors, vanish with the difference of the maps.
      *field(kKl, row + i) = static_cast<A>(kLn2 * (et_log[i] / z_t[i]) + log_ratio(z_s[i], z_t[i], z_gap[i]));
    }
  }
  // ln(z_s / z_t) where gap is z_s - z_t, more accurate than the difference of the two.
  static double log_ratio(double z_s, double z_t, double gap) {
    return std::abs(gap) < 0.5 * z_t ? std::log1p(gap / z_t) : std::log(z_s) - std::log(z_t);
  }

  void coefficients(const Level& level, int64_t row, int64_t stride) const {
    const double r = *field(kRS, row), q = *field(kQS, row), c = o_.row_weight(level) / o_.tau;
    double projection = 0;
    for (int64_t n = 0; n < level.batch; ++n)
      projection += c * grad_output_(row + n * stride) * *field(kDot, row + n * stride);
    for (int64_t n = 0; n < level.batch; ++n, row += stride) {
      const double outer = r * c * grad_output_(row);
      *field(kKS, row) = static_cast<A>(r / o_.tau), *field(kKT, row) = static_cast<A>(*field(kRT, row) / o_.tau);
      *field(kA, row) = static_cast<A>(outer / *field(kZS, row));
      *field(kB, row) = static_cast<A>(outer / *field(kZT, row));
      *field(kSlope, row) = static_cast<A>(r * q * r * projection);
    }
  }

  void gradient(const Level& level, int64_t n, int64_t block) const {
    const int64_t row = level.row(n, block);
    kernels<A>().gradient[level.student_dtype()][level.teacher_dtype()][level.mode](
        level.strip(level.student, n, block), level.strip(level.teacher, n, block),
        level.strip(level.grad_in_place, n, block), level.rows(block),
        {field(kKS, row), field(kMaxS, row), field(kKT, row), field(kMaxT, row), field(kA, row), field(kB, row),
         o_.norm ? field(kSlope, row) : nullptr, field(kMeanS, row), field(kMeanSLo, row)});
  }

  const Problem& p_;
  const Options o_;
  A* const fields_;
  GradOutput<A> grad_output_;
};

template <class A>
Outputs forward_in(at::TensorList student, at::TensorList teacher, Options options, int64_t save) {
  const Problem problem(student, teacher, kernels<A>().lanes, save & kSaveGrads);
  const auto tensor_options = student[0].options().dtype(c10::CppTypeToScalarType<A>::value);
  const at::Tensor fields = at::empty({kFields, problem.rows}, tensor_options);
  const Cwd<A> cwd(problem, options, fields.data_ptr<A>());
  auto passes = cwd.statistics();
  std::vector<at::Tensor> grads;
  if (save & kSaveGrads)
    for (auto& pass : cwd.gradients()) passes.push_back(pass);
  problem.run(passes);
  if (save & kSaveGrads) grads = problem.finished_grads();
  const at::Tensor stats = save & kSaveStats ? fields.narrow(0, 0, kStats).clone() : at::empty({0}, tensor_options);
  return {cwd.loss(tensor_options), stats, std::move(grads)};
}

template <class A>
std::vector<at::Tensor> backward_in(const at::Tensor& grad_output, at::TensorList student, at::TensorList teacher,
                                    const at::Tensor& stats, Options options) {
  const Problem problem(student, teacher, kernels<A>().lanes, true);
  at::Tensor fields = at::empty({kFields, problem.rows}, stats.options());
  fields.narrow(0, 0, kStats).copy_(stats);
  Cwd<A> cwd(problem, options, fields.data_ptr<A>());
  cwd.set_grad_output(GradOutput<A>(grad_output));
  problem.run(cwd.gradients());
  return problem.finished_grads();
}

Outputs forward(at::TensorList student, at::TensorList teacher, double tau, int64_t norm, double eps,
                double loss_weight, int64_t reduction, int64_t save) {
  const Options options{tau, norm, eps, loss_weight, reduction};
  return in_accumulation_dtype(student, teacher, [&](auto a, at::TensorList s, at::TensorList t) {
    return forward_in<decltype(a)>(s, t, options, save);
  });
}

std::vector<at::Tensor> backward(const at::Tensor& grad_output, at::TensorList student, at::TensorList teacher,
                                 const at::Tensor& stats, double tau, int64_t norm, double eps, double loss_weight,
                                 int64_t reduction) {
  const Options options{tau, norm, eps, loss_weight, reduction};
  return in_accumulation_dtype(student, teacher, [&](auto a, at::TensorList s, at::TensorList t) {
    return backward_in<decltype(a)>(grad_output, s, t, stats, options);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("cwd_loss", forward);
  m.impl("cwd_loss_backward", backward);
}

}  // namespace kdops
