#include <emulated_tensor_core.h>

#include "worker/device/cuda/warpgroup.h"

#include <cstring>
#include <string>

#include "tests/gpu/emulator/report.h"
#include "tests/gpu/emulator/simt.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kLanes = 32;

float FloatOf(uint32_t bits) { return __builtin_bit_cast(float, bits); }
uint32_t Bf16Of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return (bits >> 16) | 0x40u;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

// A lane's part of what its warp does together.
struct Product {
  float* sums;
  uint32_t a[4], b[2];
};
struct Load {
  const char* row;
  uint32_t values[4];
};

void Multiply(void* const* lanes) {
  float a[16][16], b[16][8], sums[16][8];
  const auto unpack = [](uint32_t two, float& low, float& high) {
    low = FloatOf(two << 16);
    high = FloatOf(two & 0xFFFF0000u);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& p = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* const at = &a[g + i % 2 * 8][t + i / 2 * 8];
      unpack(p.a[i], at[0], at[1]);
      sums[g + i / 2 * 8][t + i % 2] = p.sums[i];
    }
    for (int i = 0; i < 2; ++i) unpack(p.b[i], b[t + i * 8][g], b[t + i * 8 + 1][g]);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& p = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) p.sums[i] = sums[g + i / 2 * 8][t + i % 2];
  }
}

template <bool kTransposed>
void LoadAll(void* const* lanes) {
  char rows[kLanes][16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const char* const row = static_cast<const Load*>(lanes[lane])->row;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
      emulator::Fatal("a row of a matrix is not aligned to 16 bytes");
    }
    std::memcpy(rows[lane], row, 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    Load& load = *static_cast<Load*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      char* const to = reinterpret_cast<char*>(&load.values[i]);
      if constexpr (kTransposed) {
        std::memcpy(to, rows[8 * i + 2 * t] + 2 * g, 2);
        std::memcpy(to + 2, rows[8 * i + 2 * t + 1] + 2 * g, 2);
      } else {
        std::memcpy(to, rows[8 * i + g] + 4 * t, 4);
      }
    }
  }
}

template <bool kTransposed>
uint4 LoadTogether(const void* row, emulator::Site site) {
  Load load = {static_cast<const char*>(row), {}};
  emulator::WarpTogether(&load, &LoadAll<kTransposed>, site);
  return {load.values[0], load.values[1], load.values[2], load.values[3]};
}

// Term k of row i.
float TermOf(const SharedMatrix& matrix, bool transposed, int i, int k) {
  int bytes = 0;
  if (!matrix.swizzled) {
    bytes = i / 8 * matrix.next_rows + k / 8 * matrix.next_terms +
            (transposed ? i % 8 * 2 + k % 8 * 16 : i % 8 * 16 + k % 8 * 2);
  } else if (transposed) {
    bytes = i / 64 * matrix.next_rows + k * kSwizzledRow + i % 64 * 2;
  } else {
    bytes = i * kSwizzledRow + k * 2;
  }
  auto at = reinterpret_cast<uintptr_t>(matrix.at + bytes);
  if (matrix.swizzled) at ^= at / kSwizzledRow % 8 * 16;
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const void*>(at), 2);
  return FloatOf(uint32_t{bits} << 16);
}

}  // namespace

uint32_t TwoBf16(float low, float high) { return Bf16Of(low) | Bf16Of(high) << 16; }

void MultiplyBf16(float (&sums)[4], const uint4& a, uint32_t b0, uint32_t b1, const char* file,
                  int line, const char* function) {
  Product product = {sums, {a.x, a.y, a.z, a.w}, {b0, b1}};
  emulator::WarpTogether(&product, &Multiply, {file, line, function});
}

uint4 LoadMatrices(const void* row, const char* file, int line, const char* function) {
  return LoadTogether<false>(row, {file, line, function});
}
uint4 LoadMatricesTransposed(const void* row, const char* file, int line, const char* function) {
  return LoadTogether<true>(row, {file, line, function});
}

void CopyInBackground(void* shared, const void* global) {
  CopyOrZeroInBackground(shared, global, true);
}
void CopyOrZeroInBackground(void* shared, const void* global, bool copies) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::Fatal("a copy in the background is not aligned to 16 bytes");
  }
  emulator::CopyLater(shared, copies ? global : nullptr, 16);
}
void WaitForCopies() { emulator::FinishCopies(); }
void CommitCopies() { emulator::CommitCopies(); }
void WaitForGroups(int but) { emulator::FinishGroups(but); }

void ShowToProducts() { emulator::ShowToProducts(); }
void CommitProducts() { emulator::CommitProducts(); }
void WaitForProducts(int but) { emulator::FinishProducts(but); }
void MultiplyLater(float* sums, int columns, bool transposed, const SharedMatrix& a,
                   const SharedMatrix& b) {
  const int row =
      static_cast<int>(threadIdx.x) / kLanes % 4 * 16 + static_cast<int>(threadIdx.x) % kLanes / 4;
  const int first_column = static_cast<int>(threadIdx.x) % 4 * 2;
  emulator::MultiplyLater([=] {
    for (int k = 0; k < 16; ++k) {
      const float down[2] = {TermOf(a, transposed, row, k), TermOf(a, transposed, row + 8, k)};
      for (int column = first_column; column < columns; column += 8) {
        for (int i = 0; i < 4; ++i) {
          sums[column / 8 * 4 + i] += down[i / 2] * TermOf(b, transposed, column + i % 2, k);
        }
      }
    }
  });
}

}  // namespace lockstep::device::cuda
