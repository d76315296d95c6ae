// More elementwise maps: those with a parameter, softplus and products.
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {

void LeakyReluForward(int64_t n, float slope, const float* x, float* y) {
  ForEachVector(n,
                [=](int64_t i, auto m) { Store(y + i, LeakyRelu(Load(x + i, m), F16(slope)), m); });
}

void LeakyReluBackward(int64_t n, float slope, const float* y, const float* dy, float* dx) {
  ForEachVector(n, [=](int64_t i, auto m) {
    Store(dx + i, LeakyReluGradient(Load(y + i, m), Load(dy + i, m), F16(slope)), m);
  });
}

void EluForward(int64_t n, float alpha, const float* x, float* y) {
  ForEachVector(n, [=](int64_t i, auto m) { Store(y + i, Elu(Load(x + i, m), F16(alpha)), m); });
}

void EluBackward(int64_t n, float alpha, const float* y, const float* dy, float* dx) {
  ForEachVector(n, [=](int64_t i, auto m) {
    Store(dx + i, EluGradient(Load(y + i, m), Load(dy + i, m), F16(alpha)), m);
  });
}

void SoftplusForward(int64_t n, const float* x, float* y) {
  ForEachVector(n, [=](int64_t i, auto m) { Store(y + i, Softplus(Load(x + i, m)), m); });
}

void SoftplusBackward(int64_t n, const float* x, const float* dy, float* dx) {
  ForEachVector(n, [=](int64_t i, auto m) {
    Store(dx + i, SoftplusGradient(Load(x + i, m), Load(dy + i, m)), m);
  });
}

void Multiply(int64_t n, const float* a, const float* b, float* out) {
  ForEachVector(n, [=](int64_t i, auto m) { Store(out + i, Load(a + i, m) * Load(b + i, m), m); });
}

}  // namespace lockstep::device::LOCKSTEP_ISA
