// Batch norm and column sums over {n, channels}: lanes are channels, so a channel's bits do not
// depend on how many channels are walked at once. Rows are summed in float over fixed blocks, and
// blocks are merged in double.
#include "worker/device/cpu/kernels/channel_tiles.h"
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

template <bool kRelu, int N, class M>
LOCKSTEP_SIMD void ForwardTile(int64_t channels, int64_t n, const float* x, const F16 (&mean)[N],
                               const F16 (&scale)[N], const F16 (&shift)[N], float* y, M m) {
  for (int64_t r = 0; r < n; ++r) {
    for (int k = 0; k < N; ++k) {
      const int64_t at = r * channels + k * kLanes;
      F16 value = Fma(Load(x + at, m) - mean[k], scale[k], shift[k]);
      if constexpr (kRelu) value = Relu(value);
      Store(y + at, value, m);
    }
  }
}

// dy as the normalization sees it.
template <bool kRelu, class M>
LOCKSTEP_SIMD F16 IncomingGradient(const float* y, const float* dy, M m) {
  if constexpr (kRelu) return ReluGradient(Load(y, m), Load(dy, m));
  return Load(dy, m);
}

template <bool kRelu, int N, class M>
LOCKSTEP_SIMD void SumsTile(int64_t channels, int64_t n, const float* x, const float* y,
                            const float* dy, const F16 (&mean)[N], const F16 (&inv)[N],
                            float* sum_dy, float* sum_dy_xhat, M m) {
  D16 total[N], total_x[N];
  for (int k = 0; k < N; ++k) total[k] = total_x[k] = D16(0.0);
  for (int64_t row = 0; row < n; row += kBlock) {
    const int64_t end = row + BlockRows(row, n);
    F16 sum[N], sum_x[N];
    for (int k = 0; k < N; ++k) sum[k] = sum_x[k] = F16(0.0f);
    for (int64_t r = row; r < end; ++r) {
      for (int k = 0; k < N; ++k) {
        const int64_t at = r * channels + k * kLanes;
        const F16 g = IncomingGradient<kRelu>(y + at, dy + at, m);
        sum[k] = sum[k] + g;
        sum_x[k] = Fma(g, Load(x + at, m) - mean[k], sum_x[k]);
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

template <bool kRelu, int N, class M>
LOCKSTEP_SIMD void BackwardTile(int64_t channels, int64_t n, const float* x, const float* y,
                                const float* dy, const F16 (&mean)[N], const F16 (&scale)[N],
                                const F16 (&offset)[N], const F16 (&slope)[N], float* dx, M m) {
  for (int64_t r = 0; r < n; ++r) {
    for (int k = 0; k < N; ++k) {
      const int64_t at = r * channels + k * kLanes;
      const F16 g = IncomingGradient<kRelu>(y + at, dy + at, m);
      const F16 centred = Load(x + at, m) - mean[k];
      Store(dx + at, scale[k] * Fma(F16(0.0f) - centred, slope[k], g - offset[k]), m);
    }
  }
}

}  // namespace

void BatchNormMoments(int64_t channels, int64_t n, const float* x, float* mean, float* m2) {
  ForEachTile(channels, [&](int64_t c, auto width, auto m) {
    constexpr int N = decltype(width)::value;
    D16 running_mean[N], running_m2[N];
    for (int k = 0; k < N; ++k) running_mean[k] = running_m2[k] = D16(0.0);
    for (int64_t row = 0; row < n; row += kBlock) {
      const int64_t rows = BlockRows(row, n);
      const float* block = x + row * channels + c;
      const F16 count(static_cast<float>(rows));
      F16 centre[N], residue[N], square[N];
      for (int k = 0; k < N; ++k) centre[k] = residue[k] = square[k] = F16(0.0f);
      for (int64_t r = 0; r < rows; ++r) {
        for (int k = 0; k < N; ++k) {
          centre[k] = centre[k] + Load(block + r * channels + k * kLanes, m);
        }
      }
      for (int k = 0; k < N; ++k) centre[k] = centre[k] / count;
      // The corrected two-pass algorithm (Chan, Golub & LeVeque 1983), the block being in L1.
      for (int64_t r = 0; r < rows; ++r) {
        for (int k = 0; k < N; ++k) {
          const F16 d = Load(block + r * channels + k * kLanes, m) - centre[k];
          residue[k] = residue[k] + d;
          square[k] = Fma(d, d, square[k]);
        }
      }
      const double b = static_cast<double>(rows), a = static_cast<double>(row);
      const D16 share(b / (a + b)), cross(a * b / (a + b)), inverse(1.0 / b);
      for (int k = 0; k < N; ++k) {
        const D16 e = ToDouble(residue[k]);
        const D16 block_mean = Fma(e, inverse, ToDouble(centre[k]));
        const D16 block_m2 = ToDouble(square[k]) - e * e * inverse;
        const D16 delta = block_mean - running_mean[k];
        running_mean[k] = Fma(delta, share, running_mean[k]);
        running_m2[k] = Fma(delta * delta, cross, running_m2[k] + block_m2);
      }
    }
    for (int k = 0; k < N; ++k) {
      Store(mean + c + k * kLanes, ToFloat(running_mean[k]), m);
      Store(m2 + c + k * kLanes, ToFloat(running_m2[k]), m);
    }
  });
}

void MergeMoments(int64_t channels, int64_t count_a, const float* mean_a, const float* m2_a,
                  int64_t count_b, const float* mean_b, const float* m2_b, float* mean, float* m2) {
  if (count_a == 0 || count_b == 0) {  // an empty record says nothing, whatever it holds
    const float* from_mean = count_b == 0 ? mean_a : mean_b;
    const float* from_m2 = count_b == 0 ? m2_a : m2_b;
    ForEachVector(channels, [&](int64_t c, auto m) {
      Store(mean + c, Load(from_mean + c, m), m);
      Store(m2 + c, Load(from_m2 + c, m), m);
    });
    return;
  }
  const double a = static_cast<double>(count_a), b = static_cast<double>(count_b);
  const D16 share(b / (a + b)), cross(a * b / (a + b));
  ForEachVector(channels, [&](int64_t c, auto m) {
    const D16 from = ToDouble(Load(mean_a + c, m));
    const D16 delta = ToDouble(Load(mean_b + c, m)) - from;
    const D16 spread = ToDouble(Load(m2_a + c, m)) + ToDouble(Load(m2_b + c, m));
    Store(mean + c, ToFloat(Fma(delta, share, from)), m);
    Store(m2 + c, ToFloat(Fma(delta * delta, cross, spread)), m);
  });
}

void BatchNormForward(const BatchNormShape& shape, int64_t n, const float* x, const float* mean,
                      const float* spread, float divisor, float epsilon, const float* weight,
                      const float* bias, float* y) {
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
      ForwardTile<true>(shape.channels, n, x + c, centre, scale, shift, y + c, m);
    } else {
      ForwardTile<false>(shape.channels, n, x + c, centre, scale, shift, y + c, m);
    }
  });
}

void BatchNormBackwardSums(const BatchNormShape& shape, int64_t n, const float* x, const float* y,
                           const float* dy, const float* mean, const float* m2, int64_t moments_n,
                           float epsilon, float* sum_dy, float* sum_dy_xhat) {
  ForEachTile(shape.channels, [&](int64_t c, auto width, auto m) {
    constexpr int N = decltype(width)::value;
    F16 centre[N], inv[N];
    for (int k = 0; k < N; ++k) {
      centre[k] = Load(mean + c + k * kLanes, m);
      inv[k] = InverseDeviationOf(m2 + c + k * kLanes, moments_n, epsilon, m);
    }
    if (shape.relu) {
      SumsTile<true>(shape.channels, n, x + c, y + c, dy + c, centre, inv, sum_dy + c,
                     sum_dy_xhat + c, m);
    } else {
      SumsTile<false>(shape.channels, n, x + c, nullptr, dy + c, centre, inv, sum_dy + c,
                      sum_dy_xhat + c, m);
    }
  });
}

void BatchNormBackward(const BatchNormShape& shape, int64_t n, const float* x, const float* y,
                       const float* dy, const float* mean, const float* m2, int64_t moments_n,
                       float epsilon, const float* weight, const float* sum_dy,
                       const float* sum_dy_xhat, float* dx) {
  const F16 count(static_cast<float>(moments_n));
  ForEachTile(shape.channels, [&](int64_t c, auto width, auto m) {
    constexpr int N = decltype(width)::value;
    F16 centre[N], scale[N], offset[N], slope[N];
    for (int k = 0; k < N; ++k) {
      const int64_t at = c + k * kLanes;
      const F16 inv = InverseDeviationOf(m2 + at, moments_n, epsilon, m);
      centre[k] = Load(mean + at, m);
      scale[k] = inv * Load(weight + at, m);
      offset[k] = Load(sum_dy + at, m) / count;
      slope[k] = inv * (Load(sum_dy_xhat + at, m) / count);
    }
    if (shape.relu) {
      BackwardTile<true>(shape.channels, n, x + c, y + c, dy + c, centre, scale, offset, slope,
                         dx + c, m);
    } else {
      BackwardTile<false>(shape.channels, n, x + c, nullptr, dy + c, centre, scale, offset, slope,
                          dx + c, m);
    }
  });
}

void UpdateRunningAverages(int64_t channels, int64_t n, const float* mean, const float* m2,
                           float momentum, float* running_mean, float* running_var) {
  const F16 divisor(static_cast<float>(n > 1 ? n - 1 : 1)), rate(momentum);
  ForEachVector(channels, [&](int64_t c, auto m) {
    const F16 old_mean = Load(running_mean + c, m), old_var = Load(running_var + c, m);
    const F16 variance = Load(m2 + c, m) / divisor;
    Store(running_mean + c, Fma(rate, Load(mean + c, m) - old_mean, old_mean), m);
    Store(running_var + c, Fma(rate, variance - old_var, old_var), m);
  });
}

void ColumnSums(int64_t rows, int64_t columns, const float* x, float* sums) {
  ForEachTile(columns, [&](int64_t c, auto width, auto m) {
    constexpr int N = decltype(width)::value;
    D16 total[N];
    for (int k = 0; k < N; ++k) total[k] = D16(0.0);
    for (int64_t row = 0; row < rows; row += kBlock) {
      const int64_t end = row + BlockRows(row, rows);
      F16 sum[N];
      for (int k = 0; k < N; ++k) sum[k] = F16(0.0f);
      for (int64_t r = row; r < end; ++r) {
        for (int k = 0; k < N; ++k) sum[k] = sum[k] + Load(x + r * columns + c + k * kLanes, m);
      }
      for (int k = 0; k < N; ++k) total[k] = total[k] + ToDouble(sum[k]);
    }
    for (int k = 0; k < N; ++k) Store(sums + c + k * kLanes, ToFloat(total[k]), m);
  });
}

}  // namespace lockstep::device::LOCKSTEP_ISA
