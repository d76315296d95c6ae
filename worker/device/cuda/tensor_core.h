// What kernels do on tensor cores: a warp's products of small matrices, and how their factors come
// to it. Instructions of sm_80 and later; the SIMT emulator has its own (the second header below).
// All lanes of a warp call what is said to be the warp's, at the same place.
//
// A fragment is a warp's share of a matrix, lane by lane as the instructions want it: with g = lane
// / 4 and t = lane % 4, sums {16, 8} have of each lane (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8,
// 2t + 1).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__)

namespace lockstep::device::cuda {

// ---- rounding of factors: to nearest even, NaN stays NaN; the first is the low half.
__device__ __forceinline__ uint32_t TwoBf16(float low, float high) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

// ---- the warp's. sums {16, 8} += a {16, 16} * b {16, 8} of bf16.
__device__ __forceinline__ void MultiplyBf16(float (&sums)[4], const uint4& a, uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes; `row`, in shared memory and aligned, is row lane % 8 of
// matrix lane / 8. Each lane gets, of each matrix, bytes [4t, 4t + 4) of row g; transposed: the
// 2-byte elements g of rows 2t and 2t + 1.
__device__ __forceinline__ uint4 LoadMatrices(const void* row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return v;
}
__device__ __forceinline__ uint4 LoadMatricesTransposed(const void* row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return v;
}

// ---- a thread's copies of 16 aligned bytes from global to shared memory, in the background. Those
// before WaitForCopies are done behind it, for the thread itself.
__device__ __forceinline__ void CopyInBackground(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
// The same, or 16 bytes of zeros.
__device__ __forceinline__ void CopyOrZeroInBackground(void* shared, const void* global,
                                                       bool copies) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(copies ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// The thread's copies up to here, but for those of earlier groups, are a group; and: waits for all
// groups but the last kBut.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kBut>
__device__ __forceinline__ void WaitForGroups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kBut) : "memory");
}

}  // namespace lockstep::device::cuda

#else
#include <emulated_tensor_core.h>
#endif
