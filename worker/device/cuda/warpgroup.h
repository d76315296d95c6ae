// What a warpgroup, four neighbouring warps, does on the tensor cores of sm_90a: products of
// matrices in shared memory, in the background. The SIMT emulator has its own (the second header
// below). All threads of a warpgroup call what is said to be the warpgroup's, at the same place.
//
// A matrix in shared memory is of rows of 64 terms of bf16, 128 bytes, of which the 16-byte pieces
// are turned: piece p of row r stands where piece p ^ r % 8 would (the 128-byte swizzle of PTX ISA,
// "Asynchronous Warpgroup Level Matrix Instructions"), where rows are counted from a multiple of
// 1024 bytes. Or it is of pieces of 16 bytes, which may be parts of several rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lockstep::device::cuda {
constexpr int kSwizzledRow = 128, kSwizzledAlignment = 1024;  // bytes
// Whether these instructions are there: elsewhere a kernel has no body, and nobody launches it.
#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// How many multiprocessors this thread's GPU has, if they have these instructions; else 0.
inline int WarpgroupProcessors() {
  int device = 0, major = 0, minor = 0, processors = 0;
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
  };
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     get(&major, cudaDevAttrComputeCapabilityMajor) &&
                     get(&minor, cudaDevAttrComputeCapabilityMinor) &&
                     get(&processors, cudaDevAttrMultiProcessorCount);
  return known && major == 9 && minor == 0 ? processors : 0;
}

}  // namespace lockstep::device::cuda

#if defined(__CUDACC__)

namespace lockstep::device::cuda {

using SharedMatrix = uint64_t;  // as the instruction is told it

// A matrix for products; of one that is read transposed, the bytes from 64 columns to the next 64.
__device__ __forceinline__ SharedMatrix MatrixIn(const void* shared, int next_columns = 16) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(next_columns / 16) << 16 |
         uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;  // eight rows, the swizzle's kind
}
// One of pieces of eight terms of a row (of eight columns of a term, where it is read transposed).
// Those of the next row (term) are 16 bytes behind; it says how far the next eight rows (columns),
// and the next eight terms are.
__device__ __forceinline__ SharedMatrix MatrixOfPieces(const void* shared, int next_rows,
                                                       int next_terms) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(next_terms / 16) << 16 |
         static_cast<uint64_t>(next_rows / 16) << 32;
}
// What begins that many bytes behind: 16 terms of a row are 32, eight rows 1024.
__device__ __forceinline__ SharedMatrix Behind(SharedMatrix matrix, int bytes) {
  return matrix + bytes / 16;
}

// The first bytes from p on, in shared memory, from which rows may be counted.
__device__ __forceinline__ char* AlignMatrix(char* p) {
  return p + (-static_cast<uint32_t>(__cvta_generic_to_shared(p)) & (kSwizzledAlignment - 1));
}

// What this thread has written to shared memory, is seen by products behind the next barrier.
__device__ __forceinline__ void ShowToProducts() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- the warpgroup's. Between the first, which comes before products, and the wait for them, no
// sum is looked at.
__device__ __forceinline__ void BeginProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// The products up to here, but for those of earlier groups, are a group; and: waits for all groups
// but the last kBut.
__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kBut>
__device__ __forceinline__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kBut) : "memory");
}
// Nothing that the compiler does with the sums moves over this.
template <int kCount>
__device__ __forceinline__ void KeepSums(float (&sums)[kCount][4]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    asm volatile(""
                 : "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]),
                   "+f"(sums[j][3])::"memory");
  }
}

// sums {64, kColumns} += a {64, 16} * b {kColumns, 16} transposed; kTransposed: of rows of terms, a
// {16, 64} transposed * b {16, kColumns}. Of warp w, lane 4g + t, sums[j] are those of rows 16w + g
// (two) and 16w + g + 8, columns 8j + 2t and 8j + 2t + 1.
template <int kColumns, bool kTransposed = false>
__device__ __forceinline__ void MultiplyWarpgroup(float (&sums)[kColumns / 8][4], SharedMatrix a,
                                                  SharedMatrix b) {
  static_assert(kColumns == 32 || kColumns == 64 || kColumns == 128 || kColumns == 256);
#define LOCKSTEP_FOUR(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
  // clang-format off
  if constexpr (kColumns == 32) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, 1, 1, 1, %18, %18;"
        : LOCKSTEP_FOUR(0), LOCKSTEP_FOUR(1), LOCKSTEP_FOUR(2), LOCKSTEP_FOUR(3)
        : "l"(a), "l"(b), "n"(kTransposed ? 1 : 0));
  } else if constexpr (kColumns == 64) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, %34, %34;"
        : LOCKSTEP_FOUR(0), LOCKSTEP_FOUR(1), LOCKSTEP_FOUR(2), LOCKSTEP_FOUR(3),
          LOCKSTEP_FOUR(4), LOCKSTEP_FOUR(5), LOCKSTEP_FOUR(6), LOCKSTEP_FOUR(7)
        : "l"(a), "l"(b), "n"(kTransposed ? 1 : 0));
  } else if constexpr (kColumns == 128) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, %66, %66;"
        : LOCKSTEP_FOUR(0), LOCKSTEP_FOUR(1), LOCKSTEP_FOUR(2), LOCKSTEP_FOUR(3),
          LOCKSTEP_FOUR(4), LOCKSTEP_FOUR(5), LOCKSTEP_FOUR(6), LOCKSTEP_FOUR(7),
          LOCKSTEP_FOUR(8), LOCKSTEP_FOUR(9), LOCKSTEP_FOUR(10), LOCKSTEP_FOUR(11),
          LOCKSTEP_FOUR(12), LOCKSTEP_FOUR(13), LOCKSTEP_FOUR(14), LOCKSTEP_FOUR(15)
        : "l"(a), "l"(b), "n"(kTransposed ? 1 : 0));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, 1, 1, 1, %130, %130;"
        : LOCKSTEP_FOUR(0), LOCKSTEP_FOUR(1), LOCKSTEP_FOUR(2), LOCKSTEP_FOUR(3),
          LOCKSTEP_FOUR(4), LOCKSTEP_FOUR(5), LOCKSTEP_FOUR(6), LOCKSTEP_FOUR(7),
          LOCKSTEP_FOUR(8), LOCKSTEP_FOUR(9), LOCKSTEP_FOUR(10), LOCKSTEP_FOUR(11),
          LOCKSTEP_FOUR(12), LOCKSTEP_FOUR(13), LOCKSTEP_FOUR(14), LOCKSTEP_FOUR(15),
          LOCKSTEP_FOUR(16), LOCKSTEP_FOUR(17), LOCKSTEP_FOUR(18), LOCKSTEP_FOUR(19),
          LOCKSTEP_FOUR(20), LOCKSTEP_FOUR(21), LOCKSTEP_FOUR(22), LOCKSTEP_FOUR(23),
          LOCKSTEP_FOUR(24), LOCKSTEP_FOUR(25), LOCKSTEP_FOUR(26), LOCKSTEP_FOUR(27),
          LOCKSTEP_FOUR(28), LOCKSTEP_FOUR(29), LOCKSTEP_FOUR(30), LOCKSTEP_FOUR(31)
        : "l"(a), "l"(b), "n"(kTransposed ? 1 : 0));
  }
}
// clang-format on
#undef LOCKSTEP_FOUR

}  // namespace lockstep::device::cuda

#elif __has_include(<emulated_warpgroup.h>)  // not of a host's file that only asks for the GPU
#include <emulated_warpgroup.h>
#endif
