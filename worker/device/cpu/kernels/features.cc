// Softmax and layer norm over the last dimension: one vector at a time, lanes over features, sums
// in double.
#include "worker/device/cpu/kernels/channel_tiles.h"
#include "worker/device/cpu/kernels/feature_lanes.h"
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {

void SoftmaxForward(int64_t n, int64_t features, const float* x, float* y) {
  for (int64_t r = 0; r < n; ++r, x += features, y += features) {
    const float largest = LargestOf(features, x);
    D16 sums(0.0);
    ForEachVector(features, [&](int64_t i, auto m) {
      const F16 e = Exp(Load(x + i, m) - F16(largest));
      sums = sums + ToDouble(OnlyLanes(e, m, 0.0f));
      Store(y + i, e, m);
    });
    const float inverse = static_cast<float>(1.0 / SumLanes(sums));
    ForEachVector(features,
                  [=](int64_t i, auto m) { Store(y + i, Load(y + i, m) * F16(inverse), m); });
  }
}

void SoftmaxBackward(int64_t n, int64_t features, const float* y, const float* dy, float* dx) {
  for (int64_t r = 0; r < n; ++r, y += features, dy += features, dx += features) {
    D16 sums(0.0);
    ForEachVector(features, [&](int64_t i, auto m) {
      sums = Fma(ToDouble(Load(y + i, m)), ToDouble(Load(dy + i, m)), sums);
    });
    const float sum = static_cast<float>(SumLanes(sums));
    ForEachVector(features, [=](int64_t i, auto m) {
      Store(dx + i, Load(y + i, m) * (Load(dy + i, m) - F16(sum)), m);
    });
  }
}

void LayerNormForward(int64_t n, int64_t features, const float* x, float epsilon,
                      const float* weight, const float* bias, float* y, float* stats) {
  const double count = static_cast<double>(features);
  for (int64_t r = 0; r < n; ++r, x += features, y += features, stats += 2) {
    D16 sums(0.0), squares(0.0);
    ForEachVector(features, [&](int64_t i, auto m) { sums = sums + ToDouble(Load(x + i, m)); });
    const F16 mean(static_cast<float>(SumLanes(sums) / count));
    ForEachVector(features, [&](int64_t i, auto m) {
      const F16 d = OnlyLanes(Load(x + i, m) - mean, m, 0.0f);
      squares = Fma(ToDouble(d), ToDouble(d), squares);
    });
    const F16 inv =
        InverseDeviation(F16(static_cast<float>(SumLanes(squares) / count)), F16(epsilon));
    Store(stats, mean, FirstLanes(1));
    Store(stats + 1, inv, FirstLanes(1));
    ForEachVector(features, [=](int64_t i, auto m) {
      Store(y + i, Fma((Load(x + i, m) - mean) * inv, Load(weight + i, m), Load(bias + i, m)), m);
    });
  }
}

void LayerNormBackward(int64_t n, int64_t features, const float* x, const float* stats,
                       const float* weight, const float* dy, float* dx) {
  const double count = static_cast<double>(features);
  for (int64_t r = 0; r < n; ++r, x += features, dy += features, dx += features, stats += 2) {
    const F16 mean(stats[0]), inv(stats[1]);
    D16 sums(0.0), sums_x(0.0);
    ForEachVector(features, [&](int64_t i, auto m) {
      const F16 g = Load(dy + i, m) * Load(weight + i, m);
      const F16 xhat = (Load(x + i, m) - mean) * inv;
      sums = sums + ToDouble(g);
      sums_x = Fma(ToDouble(g), ToDouble(xhat), sums_x);
    });
    const F16 offset(static_cast<float>(SumLanes(sums) / count));
    const F16 slope(static_cast<float>(SumLanes(sums_x) / count));
    ForEachVector(features, [=](int64_t i, auto m) {
      const F16 g = Load(dy + i, m) * Load(weight + i, m);
      const F16 xhat = (Load(x + i, m) - mean) * inv;
      Store(dx + i, inv * Fma(F16(0.0f) - xhat, slope, g - offset), m);
    });
  }
}

void LayerNormBackwardWeight(int64_t n, int64_t features, const float* x, const float* stats,
                             const float* dy, float* dweight, float* dbias) {
  ForEachTile(features, [&](int64_t c, auto width, auto m) {
    constexpr int N = decltype(width)::value;
    D16 total[N], total_x[N];
    for (int k = 0; k < N; ++k) total[k] = total_x[k] = D16(0.0);
    for (int64_t row = 0; row < n; row += kBlock) {
      const int64_t end = row + BlockRows(row, n);
      F16 sum[N], sum_x[N];
      for (int k = 0; k < N; ++k) sum[k] = sum_x[k] = F16(0.0f);
      for (int64_t r = row; r < end; ++r) {
        const F16 mean(stats[2 * r]), inv(stats[2 * r + 1]);
        for (int k = 0; k < N; ++k) {
          const int64_t at = r * features + c + k * kLanes;
          const F16 g = Load(dy + at, m);
          sum[k] = sum[k] + g;
          sum_x[k] = Fma(g, (Load(x + at, m) - mean) * inv, sum_x[k]);
        }
      }
      for (int k = 0; k < N; ++k) {
        total[k] = total[k] + ToDouble(sum[k]);
        total_x[k] = total_x[k] + ToDouble(sum_x[k]);
      }
    }
    for (int k = 0; k < N; ++k) {
      Store(dbias + c + k * kLanes, ToFloat(total[k]), m);
      Store(dweight + c + k * kLanes, ToFloat(total_x[k]), m);
    }
  });
}

}  // namespace lockstep::device::LOCKSTEP_ISA
