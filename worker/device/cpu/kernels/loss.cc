// Losses: one row at a time, lanes over classes or features, sums in double.
#include "worker/device/cpu/kernels/feature_lanes.h"
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {
void SoftmaxCrossEntropy(int64_t rows, int64_t classes, const float* logits, const int32_t* labels,
                         float scale, double* loss_sum, int64_t* correct, float* dlogits) {
  double total = 0;
  int64_t hits = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = logits + r * classes;
    const int32_t label = labels[r];
    const float largest = LargestOf(classes, x);
    D16 sums(0.0);
    ForEachVector(classes, [&](int64_t i, auto m) {
      sums = sums + ToDouble(OnlyLanes(Exp(Load(x + i, m) - F16(largest)), m, 0.0f));
    });
    const double sum = SumLanes(sums);
    total += Log(sum) - (static_cast<double>(x[label]) - static_cast<double>(largest));
    hits += IsFirstLargest(classes, x, label, largest) ? 1 : 0;
    if (dlogits == nullptr) continue;
    float* d = dlogits + r * classes;
    const float inverse = static_cast<float>(1.0 / sum);
    const float at_label = x[label];  // dlogits may alias logits
    ForEachVector(classes, [&](int64_t i, auto m) {
      Store(d + i, Exp(Load(x + i, m) - F16(largest)) * F16(inverse) * F16(scale), m);
    });
    const F16 p = Exp(F16(at_label) - F16(largest)) * F16(inverse);
    Store(d + label, (p - F16(1.0f)) * F16(scale), FirstLanes(1));
  }
  *loss_sum = total;
  *correct = hits;
}

void MeanSquaredError(int64_t rows, int64_t features, const float* y, const float* target,
                      float scale, double* loss_sum, float* dy) {
  const double count = static_cast<double>(features);
  const F16 factor(static_cast<float>(2.0 / count * static_cast<double>(scale)));
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * features;
    D16 sums(0.0);
    ForEachVector(features, [&](int64_t i, auto m) {
      const F16 d = Load(y + row + i, m) - Load(target + row + i, m);
      const D16 wide = ToDouble(d);
      sums = Fma(wide, wide, sums);
      if (dy != nullptr) Store(dy + row + i, d * factor, m);
    });
    total += SumLanes(sums) / count;
  }
  *loss_sum = total;
}

void CountCorrect(int64_t rows, int64_t classes, const float* scores, const int32_t* labels,
                  int64_t* correct) {
  int64_t hits = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = scores + r * classes;
    hits += IsFirstLargest(classes, x, labels[r], LargestOf(classes, x)) ? 1 : 0;
  }
  *correct = hits;
}

}  // namespace lockstep::device::LOCKSTEP_ISA
