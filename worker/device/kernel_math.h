// Scalar mathematics of the kernels, written once: instantiated with float by CUDA kernels and by
// tests, and with a 16-lane vector (worker/device/cpu/simd.h) by the CPU kernels. Only correctly
// rounded operations (+ - * / sqrt fma) in a fixed order, so an element's bits are the same
// whichever lane, tail or device width computes it.
//
// A vector type V provides V(float), the arithmetic operators and, found by argument-dependent
// lookup, the functions that are defined for float here: Fma, Sqrt, Abs, Maximum, Less, IsNan,
// Select, RoundToInt, ScaleByPowerOfTwo. Functions are always inlined: the CPU kernels are built
// once per instruction set, and no copy made for one may be linked into baseline code. Thread-safe:
// pure.
#pragma once

#include <cstdint>

#include "worker/device/kernel_types.h"

#if defined(__CUDACC__)
#define LOCKSTEP_MATH __host__ __device__ __forceinline__
#else
#define LOCKSTEP_MATH [[gnu::always_inline]] inline
#endif

namespace lockstep::device {

// ---- the operations, for one float.
LOCKSTEP_MATH float Fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LOCKSTEP_MATH float Sqrt(float x) { return __builtin_sqrtf(x); }
LOCKSTEP_MATH float Abs(float x) { return __builtin_fabsf(x); }
// The second where either is NaN or both are zero (the x86 rule).
LOCKSTEP_MATH float Maximum(float a, float b) { return a > b ? a : b; }
LOCKSTEP_MATH bool Less(float a, float b) { return a < b; }
LOCKSTEP_MATH bool IsNan(float a) { return a != a; }
LOCKSTEP_MATH float Select(bool condition, float a, float b) { return condition ? a : b; }
// To the nearest integer, ties to even; |x| < 2^22.
LOCKSTEP_MATH float RoundToInt(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
// x * 2^n, rounded once, for integral n, |n| <= 252, and |x| of about 1; NaN for NaN.
LOCKSTEP_MATH float ScaleByPowerOfTwo(float x, float n) {
  // The last bits of n + 1.5 * 2^23 are those of n as an integer: no conversion, which is slow on
  // GPUs. They are moved into the exponent's place, of which nothing is left above.
  const float shifted = n + 0x1.8p23f;
  uint32_t whole;
  __builtin_memcpy(&whole, &shifted, 4);
  // In two factors: 2^n itself may overflow or be subnormal; the first product is exact.
  const uint32_t half = whole >> 1, rest = whole - half;
  const uint32_t half_bits = (half << 23) + 0x3F800000u, rest_bits = (rest << 23) + 0x3F800000u;
  float half_power, rest_power;
  __builtin_memcpy(&half_power, &half_bits, 4);
  __builtin_memcpy(&rest_power, &rest_bits, 4);
  return x * half_power * rest_power;  // a NaN stays one by whatever finite or infinite number
}

LOCKSTEP_MATH bool IsFinite(double x) { return x - x == 0.0; }

// What a gradient of this norm is multiplied by so that its norm is at most `clip_norm`; PyTorch's
// min(1, clip_norm / (norm + 1e-6)). 1 where clip_norm is 0.
LOCKSTEP_MATH double ClipScale(double norm, double clip_norm) {
  if (!(clip_norm > 0)) return 1.0;
  const double scale = clip_norm / (norm + 1e-6);
  return scale < 1.0 ? scale : 1.0;
}

// ---- elementary functions.

// exp, within 1 ulp (2 where the result is subnormal). x = n ln 2 + r, ln 2 in two parts (Cody &
// Waite 1980); e^r by its Taylor polynomial of degree 7, |r| <= ln(2) / 2.
enum class Range { kAll, kNotAbove0, kNotBelow0 };  // of the argument
template <Range kRange = Range::kAll, class V>
LOCKSTEP_MATH V Exp(V x) {
  V clamped = x;
  if constexpr (kRange != Range::kNotBelow0) clamped = Maximum(V(-104.0f), clamped);  // keeps NaN
  if constexpr (kRange != Range::kNotAbove0) {
    const V high(89.0f);
    clamped = Select(Less(high, clamped), high, clamped);
  }
  const V n = RoundToInt(clamped * V(1.44269504088896341f));
  V r = Fma(n, V(-0.693145751953125f), clamped);
  r = Fma(n, V(-1.42860682030941723e-6f), r);
  V p(1.0f / 5040);
  p = Fma(p, r, V(1.0f / 720));
  p = Fma(p, r, V(1.0f / 120));
  p = Fma(p, r, V(1.0f / 24));
  p = Fma(p, r, V(1.0f / 6));
  p = Fma(p, r, V(0.5f));
  p = Fma(p * r, r, r) + V(1.0f);
  return ScaleByPowerOfTwo(p, n);
}

// tanh, within 2 ulp: an odd minimax polynomial near 0 (Moshier, Cephes tanhf), otherwise
// 1 - 2 / (e^2|x| + 1).
template <class V>
LOCKSTEP_MATH V Tanh(V x) {
  const V a = Abs(x);
  const V s = x * x;
  V p(-5.70498872745e-3f);
  p = Fma(p, s, V(2.06390887954e-2f));
  p = Fma(p, s, V(-5.37397155531e-2f));
  p = Fma(p, s, V(1.33314422036e-1f));
  p = Fma(p, s, V(-3.33332819422e-1f));
  const V small = Fma(p * s, x, x);
  const V e = Exp<Range::kNotBelow0>(a + a);
  const V large = V(1.0f) - V(2.0f) / (e + V(1.0f));
  const V signed_large = Select(Less(x, V(0.0f)), V(0.0f) - large, large);
  return Select(Less(a, V(0.625f)), small, signed_large);
}

// 1 / (1 + e^-x), within 3 ulp; exact in the tails because e is taken of -|x|.
template <class V>
LOCKSTEP_MATH V Sigmoid(V x) {
  const V e = Exp<Range::kNotAbove0>(V(0.0f) - Abs(x));
  return Select(Less(x, V(0.0f)), e, V(1.0f)) / (V(1.0f) + e);
}

// e^x - 1 for x <= 0, within 2 ulp: near 0 the polynomial of Exp without its 1.
template <class V>
LOCKSTEP_MATH V ExpMinusOne(V x) {
  V p(1.0f / 40320);
  p = Fma(p, x, V(1.0f / 5040));
  p = Fma(p, x, V(1.0f / 720));
  p = Fma(p, x, V(1.0f / 120));
  p = Fma(p, x, V(1.0f / 24));
  p = Fma(p, x, V(1.0f / 6));
  p = Fma(p, x, V(0.5f));
  p = Fma(p * x, x, x);
  return Select(Less(V(-0.5f), x), p, Exp(x) - V(1.0f));
}

// log(1 + x) for 0 <= x <= 1, within 2 ulp: 2 artanh(s), s = x / (2 + x) <= 1/3, by its series.
template <class V>
LOCKSTEP_MATH V LogOnePlus(V x) {
  const V s = x / (V(2.0f) + x);
  const V z = s * s;
  V p(1.0f / 17);
  p = Fma(p, z, V(1.0f / 15));
  p = Fma(p, z, V(1.0f / 13));
  p = Fma(p, z, V(1.0f / 11));
  p = Fma(p, z, V(1.0f / 9));
  p = Fma(p, z, V(1.0f / 7));
  p = Fma(p, z, V(1.0f / 5));
  p = Fma(p, z, V(1.0f / 3));
  const V twice = s + s;
  return Fma(twice * z, p, twice);
}

// Natural logarithm of a normal positive double, within 1 ulp (the reduction and polynomial of
// FreeBSD msun e_log.c, Sun Microsystems 1993). NaN for NaN, +inf for +inf.
LOCKSTEP_MATH double Log(double x) {
  if (!(x < 1.7976931348623157e308)) return x;
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  // m in [sqrt(1/2), sqrt(2)).
  const uint64_t sqrt_half = 0x3FE6A09E667F3BCDull;
  const int64_t k = static_cast<int64_t>(bits - sqrt_half) >> 52;
  bits -= static_cast<uint64_t>(k) << 52;
  double m;
  __builtin_memcpy(&m, &bits, 8);
  const double f = m - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s, w = z * z;
  const double t1 = w * (3.999999999940941908e-01 +
                         w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double t2 = z * (6.666666666666735130e-01 +
                         w * (2.857142874366239149e-01 +
                              w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  const double r = t1 + t2;
  const double half_square = 0.5 * f * f;
  const double dk = static_cast<double>(k);
  return dk * 6.93147180369123816490e-01 -
         ((half_square - (s * (half_square + r) + dk * 1.90821492927058770002e-10)) - f);
}

// ---- maps and their gradients. `dy` is the gradient of the output y.
template <class V>
LOCKSTEP_MATH V Relu(V x) {
  return Maximum(V(0.0f), x);  // NaN stays NaN, so that it is seen
}
template <class V>
LOCKSTEP_MATH V ReluGradient(V y, V dy) {
  return Select(Less(V(0.0f), y), dy, V(0.0f));
}
template <class V>
LOCKSTEP_MATH V TanhGradient(V y, V dy) {
  return dy * Fma(V(0.0f) - y, y, V(1.0f));
}
template <class V>
LOCKSTEP_MATH V SigmoidGradient(V y, V dy) {
  return dy * (y * (V(1.0f) - y));
}

// ---- one unit of an LSTM cell (device.h, LstmShape). The gates are activations.
template <class V>
LOCKSTEP_MATH void LstmState(V i, V f, V g, V o, V c_before, V& c, V& tanh_c, V& h) {
  c = Fma(f, c_before, i * g);
  tanh_c = Tanh(c);
  h = o * tanh_c;
}
// The gates hold pre-activations and take their activations.
template <class V>
LOCKSTEP_MATH void LstmCell(V& i, V& f, V& g, V& o, V c_before, V& c, V& tanh_c, V& h) {
  i = Sigmoid(i);
  f = Sigmoid(f);
  g = Tanh(g);
  o = Sigmoid(o);
  LstmState(i, f, g, o, c_before, c, tanh_c, h);
}
// The gates hold activations and take the gradients of their pre-activations; dc holds the gradient
// of c from the step behind and takes that of c_before.
template <class V>
LOCKSTEP_MATH void LstmCellGradient(V& i, V& f, V& g, V& o, V c_before, V tanh_c, V dh, V& dc) {
  const V d = Fma(dh, TanhGradient(tanh_c, o), dc);
  const V di = SigmoidGradient(i, d * g);
  const V df = SigmoidGradient(f, d * c_before);
  const V dg = TanhGradient(g, d * i);
  dc = d * f;
  o = SigmoidGradient(o, dh * tanh_c);
  i = di;
  f = df;
  g = dg;
}
template <class V>
LOCKSTEP_MATH V LeakyRelu(V x, V slope) {
  return Select(Less(x, V(0.0f)), slope * x, x);
}
// 0 <= slope < 1, so that y has the sign of x.
template <class V>
LOCKSTEP_MATH V LeakyReluGradient(V y, V dy, V slope) {
  return Select(Less(V(0.0f), y), dy, slope * dy);
}
// alpha (e^x - 1) below 0 (Clevert et al. 2016); alpha > 0.
template <class V>
LOCKSTEP_MATH V Elu(V x, V alpha) {
  return Select(Less(x, V(0.0f)), alpha * ExpMinusOne(x), x);
}
template <class V>
LOCKSTEP_MATH V EluGradient(V y, V dy, V alpha) {
  return Select(Less(V(0.0f), y), dy, dy * (y + alpha));
}
// log(1 + e^x), from the side that cannot overflow.
template <class V>
LOCKSTEP_MATH V Softplus(V x) {
  return Maximum(V(0.0f), x) + LogOnePlus(Exp(V(0.0f) - Abs(x)));
}
template <class V>
LOCKSTEP_MATH V SoftplusGradient(V x, V dy) {
  return dy * Sigmoid(x);
}

// ---- batch norm, per channel.
template <class V>
LOCKSTEP_MATH V InverseDeviation(V variance, V epsilon) {
  return V(1.0f) / Sqrt(variance + epsilon);
}

// One channel of the union of two records (Chan, Golub & LeVeque 1983) that are not empty: share =
// count_b / (count_a + count_b), cross = count_a count_b / (count_a + count_b).
LOCKSTEP_MATH void MergeChannel(double share, double cross, float mean_a, float m2_a, float mean_b,
                                float m2_b, float& mean, float& m2) {
  const double from = static_cast<double>(mean_a);
  const double delta = static_cast<double>(mean_b) - from;
  const double spread = static_cast<double>(m2_a) + static_cast<double>(m2_b);
  mean = static_cast<float>(__builtin_fma(delta, share, from));
  m2 = static_cast<float>(__builtin_fma(delta * delta, cross, spread));
}

// One channel's running averages, moved towards the moments of n elements.
LOCKSTEP_MATH void UpdateRunningAverage(int64_t n, float mean, float m2, float momentum,
                                        float& running_mean, float& running_var) {
  const float variance = m2 / static_cast<float>(n > 1 ? n - 1 : 1);
  running_mean = Fma(momentum, mean - running_mean, running_mean);
  running_var = Fma(momentum, variance - running_var, running_var);
}

// ---- optimizers (kernel_types.h, OptimizerCoefficients): one element, in this order of
// operations.
template <OptimizerType kType, class V>
LOCKSTEP_MATH void OptimizerStep(const OptimizerCoefficients& c, const StepScalars& s, V g, V& w,
                                 V (&slots)[kMostSlots]) {
  using Type = OptimizerType;
  auto& [slot0, slot1, slot2] = slots;
  const float rate = s.learning_rate * c.rate_multiplier;
  const V minus_rate(-rate), limit(c.clip_value);
  g = V(s.gradient_scale) * g;
  g = Select(Less(limit, g), limit, g);  // keeps NaN
  g = Select(Less(g, V(0.0f) - limit), V(0.0f) - limit, g);
  g = Fma(V(c.l2), w, g);
  w = Fma(V(-(rate * c.weight_decay)), w, w);
  if constexpr (kType == Type::kSgd) {
    w = Fma(minus_rate, g, w);
  } else if constexpr (kType == Type::kMomentum) {
    slot0 = Fma(V(c.momentum), slot0, g);
    w = Fma(minus_rate, slot0, w);
  } else if constexpr (kType == Type::kNesterov) {
    slot0 = Fma(V(c.momentum), slot0, g);
    w = Fma(minus_rate, Fma(V(c.momentum), slot0, g), w);
  } else if constexpr (kType == Type::kAdam) {
    slot0 = Fma(V(c.beta1), slot0, V(1.0f - c.beta1) * g);
    slot1 = Fma(V(c.beta2), slot1, V(1.0f - c.beta2) * (g * g));
    const V step =
        (slot0 / V(s.adam_correction1)) / (Sqrt(slot1 / V(s.adam_correction2)) + V(c.epsilon));
    w = Fma(minus_rate, step, w);
  } else if constexpr (kType == Type::kAdagrad) {
    slot0 = Fma(g, g, slot0);
    w = Fma(minus_rate, g / (Sqrt(slot0) + V(c.epsilon)), w);
  } else if constexpr (kType == Type::kAdadelta) {
    slot0 = Fma(V(c.rho), slot0, V(1.0f - c.rho) * (g * g));
    const V step = Sqrt(slot1 + V(c.epsilon)) / Sqrt(slot0 + V(c.epsilon)) * g;
    slot1 = Fma(V(c.rho), slot1, V(1.0f - c.rho) * (step * step));
    w = Fma(minus_rate, step, w);
  } else {
    constexpr bool kCentered =
        kType == Type::kRmsPropCentered || kType == Type::kRmsPropCenteredMomentum;
    slot0 = Fma(V(c.rho), slot0, V(1.0f - c.rho) * (g * g));
    V variance = slot0;
    if constexpr (kCentered) {
      slot1 = Fma(V(c.rho), slot1, V(1.0f - c.rho) * g);
      // Rounding may bring it below zero; NaN stays NaN.
      variance = Maximum(V(0.0f), Fma(V(0.0f) - slot1, slot1, slot0));
    }
    V step = g / (Sqrt(variance) + V(c.epsilon));
    if constexpr (kType == Type::kRmsPropMomentum || kType == Type::kRmsPropCenteredMomentum) {
      V& buffer = kCentered ? slot2 : slot1;
      step = buffer = Fma(V(c.momentum), buffer, step);
    }
    w = Fma(minus_rate, step, w);
  }
}

}  // namespace lockstep::device
