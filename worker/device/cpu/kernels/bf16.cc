// The kernels whose products are of bf16. Built once more for AVX512_BF16, which has an instruction
// for them.
#include "worker/device/cpu/kernels/gemm_products.h"
#include "worker/device/cpu/kernels/lstm_step.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

void PairColumns(int64_t rows, int64_t columns, const float* x, float* pairs) {
  const int64_t elements = Pairs::Elements(columns);
  for (int64_t r = 0; r < rows; ++r, x += columns, pairs += elements) {
    for (int64_t e = 0; e < elements; e += kLanes) {
      const F16 loaded = Pairs::LoadElements(x + 2 * e, columns - 2 * e);
      if (elements - e >= kLanes) {
        Store(pairs + e, loaded, All());
      } else {
        Store(pairs + e, loaded, FirstLanes(elements - e));
      }
    }
  }
}

void PairRows(int64_t rows, int64_t columns, const float* x, float* pairs) {
  for (int64_t r = 0; r < rows; r += 2, pairs += columns) {
    const float* const low = x + r * columns;
    const bool paired = r + 1 < rows;
    ForEachVector(columns, [&](int64_t j, auto m) {
      const F16 high = paired ? Load(low + columns + j, m) : F16(0.0f);
      Store(pairs + j, PairUp(Load(low + j, m), high), m);
    });
  }
}

void Round(int64_t n, const float* x, uint16_t* bf16) {
  PairColumns(1, n / 2 * 2, x, reinterpret_cast<float*>(bf16));
  if (n % 2 == 0) return;
  float last;
  PairColumns(1, 1, x + n - 1, &last);
  bf16[n - 1] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, last));
}

void RoundInFloats(int64_t n, const float* x, float* rounded) {
  ForEachVector(
      n, [&](int64_t i, auto m) { Store(rounded + i, FromBits(RoundToBf16(Load(x + i, m))), m); });
}

}  // namespace

const Bf16Kernels kBf16Kernels = {
    .pair_columns = PairColumns,
    .pair_rows = PairRows,
    .round = Round,
    .round_in_floats = RoundInFloats,
    .gemm = Product<Pairs>,
    .dense_forward = ForwardProduct<Pairs>,
    .dense_weight_gradient = WeightGradient<Pairs>,
    .lstm_forward_step = ForwardStepOf<Pairs>,
    .lstm_backward_step = BackwardStepOf<Pairs>,
};

}  // namespace lockstep::device::LOCKSTEP_ISA
