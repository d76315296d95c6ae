// Batch norm with a residual: relu(norm(x) + residual) in one pass, and in backward one pass that
// gathers the incoming gradient, masks it and sums it. Lanes are channels.
#include "worker/device/cpu/kernels/channel_tiles.h"
#include "worker/device/cpu/kernels/kernel_functions.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

template <bool kRelu, int N, class M>
LOCKSTEP_SIMD void AddForwardTile(int64_t channels, int64_t n, const float* x, const F16 (&mean)[N],
                                  const F16 (&scale)[N], const F16 (&shift)[N],
                                  const float* residual, float* y, M m) {
  for (int64_t r = 0; r < n; ++r) {
    for (int k = 0; k < N; ++k) {
      const int64_t at = r * channels + k * kLanes;
      F16 value = Fma(Load(x + at, m) - mean[k], scale[k], shift[k]) + Load(residual + at, m);
      if constexpr (kRelu) value = Relu(value);
      Store(y + at, value, m);
    }
  }
}

template <bool kRelu, bool kMore, int N, class M>
LOCKSTEP_SIMD void GradientTile(int64_t channels, int64_t n, const float* x, const float* y,
                                const float* dy, const float* more, const F16 (&mean)[N],
                                const F16 (&inv)[N], float* g, float* sum_dy, float* sum_dy_xhat,
                                M m) {
  D16 total[N], total_x[N];
  for (int k = 0; k < N; ++k) total[k] = total_x[k] = D16(0.0);
  for (int64_t row = 0; row < n; row += kBlock) {
    const int64_t end = row + BlockRows(row, n);
    F16 sum[N], sum_x[N];
    for (int k = 0; k < N; ++k) sum[k] = sum_x[k] = F16(0.0f);
    for (int64_t r = row; r < end; ++r) {
      for (int k = 0; k < N; ++k) {
        const int64_t at = r * channels + k * kLanes;
        F16 value = Load(dy + at, m);
        if constexpr (kMore) value = value + Load(more + at, m);
        if constexpr (kRelu) value = ReluGradient(Load(y + at, m), value);
        sum[k] = sum[k] + value;
        sum_x[k] = Fma(value, Load(x + at, m) - mean[k], sum_x[k]);
        Store(g + at, value, m);  // last: it may lie over any input
      }
    }
    for (int k = 0; k < N; ++k) {
      total[k] = total[k] + ToDouble(sum[k]);
      total_x[k] = total_x[k] + ToDouble(sum_x[k]);
    }
  }
  for (int k = 0; k < N; ++k) {
    Store(sum_dy + k * kLanes, ToFloat(total[k]), m);
    Store(sum_dy_xhat + k * kLanes, ToFloat(total_x[k]) * inv[k], m);
  }
}

}  // namespace

void BatchNormAddForward(const BatchNormShape& shape, int64_t n, const float* x, const float* mean,
                         const float* spread, float divisor, float epsilon, const float* weight,
                         const float* bias, const float* residual, float* y) {
  ForEachTile(shape.channels, [&](int64_t c, auto width, auto m) {
    constexpr int N = decltype(width)::value;
    F16 centre[N], scale[N], shift[N];
    for (int k = 0; k < N; ++k) {
      const int64_t at = c + k * kLanes;
      centre[k] = Load(mean + at, m);
      scale[k] = InverseDeviation(Load(spread + at, m) / F16(divisor), F16(epsilon)) *
                 Load(weight + at, m);
      shift[k] = Load(bias + at, m);
    }
    if (shape.relu) {
      AddForwardTile<true>(shape.channels, n, x + c, centre, scale, shift, residual + c, y + c, m);
    } else {
      AddForwardTile<false>(shape.channels, n, x + c, centre, scale, shift, residual + c, y + c, m);
    }
  });
}

void BatchNormGradient(const BatchNormShape& shape, int64_t n, const float* x, const float* y,
                       const float* dy, const float* more, const float* mean, const float* m2,
                       int64_t moments_n, float epsilon, float* g, float* sum_dy,
                       float* sum_dy_xhat) {
  ForEachTile(shape.channels, [&](int64_t c, auto width, auto m) {
    constexpr int N = decltype(width)::value;
    F16 centre[N], inv[N];
    for (int k = 0; k < N; ++k) {
      centre[k] = Load(mean + c + k * kLanes, m);
      inv[k] = InverseDeviationOf(m2 + c + k * kLanes, moments_n, epsilon, m);
    }
    const auto run = [&]<bool kRelu, bool kMore>() {
      GradientTile<kRelu, kMore>(shape.channels, n, x + c, kRelu ? y + c : nullptr, dy + c,
                                 kMore ? more + c : nullptr, centre, inv, g + c, sum_dy + c,
                                 sum_dy_xhat + c, m);
    };
    if (shape.relu) {
      more != nullptr ? run.template operator()<true, true>()
                      : run.template operator()<true, false>();
    } else {
      more != nullptr ? run.template operator()<false, true>()
                      : run.template operator()<false, false>();
    }
  });
}

}  // namespace lockstep::device::LOCKSTEP_ISA
