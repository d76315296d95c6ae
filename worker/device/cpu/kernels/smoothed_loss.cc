// Cross-entropies with soft targets: one row at a time, lanes over classes or features, sums in
// double.
#include "worker/device/cpu/kernels/feature_lanes.h"
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {

void SmoothedCrossEntropy(int64_t rows, int64_t classes, const float* logits, const int32_t* labels,
                          float smoothing, float scale, double* loss_sum, int64_t* correct,
                          float* dlogits) {
  const double share = static_cast<double>(smoothing) / static_cast<double>(classes);
  const double rest = 1.0 - static_cast<double>(smoothing);
  const F16 others(static_cast<float>(share)), own(static_cast<float>(rest + share));
  double total = 0;
  int64_t hits = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = logits + r * classes;
    const int32_t label = labels[r];
    const float largest = LargestOf(classes, x);
    D16 sums(0.0), differences(0.0);
    ForEachVector(classes, [&](int64_t i, auto m) {
      const F16 d = Load(x + i, m) - F16(largest);
      sums = sums + ToDouble(OnlyLanes(Exp(d), m, 0.0f));
      differences = differences + ToDouble(OnlyLanes(d, m, 0.0f));
    });
    const double sum = SumLanes(sums);
    // -sum over classes of target * log softmax, log softmax = x - largest - log(sum).
    const double at_label = static_cast<double>(x[label]) - static_cast<double>(largest);
    total += Log(sum) - rest * at_label - share * SumLanes(differences);
    hits += IsFirstLargest(classes, x, label, largest) ? 1 : 0;
    if (dlogits == nullptr) continue;
    float* d = dlogits + r * classes;
    const float inverse = static_cast<float>(1.0 / sum);
    const float logit = x[label];  // dlogits may alias logits
    ForEachVector(classes, [&](int64_t i, auto m) {
      const F16 p = Exp(Load(x + i, m) - F16(largest)) * F16(inverse);
      Store(d + i, (p - others) * F16(scale), m);
    });
    const F16 p = Exp(F16(logit) - F16(largest)) * F16(inverse);
    Store(d + label, (p - own) * F16(scale), FirstLanes(1));
  }
  *loss_sum = total;
  *correct = hits;
}

void SigmoidCrossEntropy(int64_t rows, int64_t features, const float* x, const float* target,
                         float scale, double* loss_sum, float* dx) {
  const double count = static_cast<double>(features);
  const F16 factor(static_cast<float>(static_cast<double>(scale) / count));
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * features;
    D16 sums(0.0);
    ForEachVector(features, [&](int64_t i, auto m) {
      const F16 value = Load(x + row + i, m), t = Load(target + row + i, m);
      const D16 loss = ToDouble(OnlyLanes(Softplus(value), m, 0.0f));
      sums = sums + (loss - ToDouble(value) * ToDouble(t));
      if (dx != nullptr) Store(dx + row + i, (Sigmoid(value) - t) * factor, m);
    });
    total += SumLanes(sums) / count;
  }
  *loss_sum = total;
}

}  // namespace lockstep::device::LOCKSTEP_ISA
