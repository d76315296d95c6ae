// Runs kernels: blocks one by one, the threads of a block as fibers that switch where they wait for
// each other. Used by one thread of the process at a time (the runtime's lock).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <functional>

#include "tests/gpu/emulator/emulator.h"

namespace lockstep::emulator {

constexpr unsigned kMostThreads = 1024;
constexpr size_t kSharedBytes = size_t{48} << 10;       // without asking for more
constexpr size_t kMostSharedBytes = size_t{227} << 10;  // of a block

struct KernelLaunch {
  const void* function = nullptr;
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool early = false;          // may begin before the kernel before it has ended
  std::function<void()> body;  // one thread
};
// Within the limits, which the caller has checked, with device memory open. `number` is that of the
// launch, for permuted orders.
void RunKernel(const KernelLaunch& launch, const Order& order, uint64_t number);

// For the instructions of emulated_tensor_core.h. All lanes of a full warp come, each with its
// record; `perform` is called once, with the records in the order of lanes, before any goes on.
void WarpTogether(void* record, void (*perform)(void* const* records), Site site);
// A copy of the running thread's (from null: of zeros) that is made when it waits for it, as it
// must. A commit ends a group of copies; FinishGroups waits for those groups that are not among the
// last `but`, and for nothing that is in none.
void CopyLater(void* to, const void* from, size_t bytes);
void CommitCopies();
void FinishCopies();
void FinishGroups(int but);
// For those of emulated_warpgroup.h: the same of products, each the running thread's part. The
// thread must have shown what it has written before the last barrier.
void ShowToProducts();
void MultiplyLater(std::function<void()> product);
void CommitProducts();
void FinishProducts(int but);

// "name<<<(1, 1, 1), (32, 1, 1), 0>>>".
std::string Describe(const KernelLaunch& launch);

// kGarbage, as 2-byte words at even addresses have it.
void FillWithGarbage(void* memory, size_t bytes);
bool IsGarbage(const void* memory, size_t bytes);

}  // namespace lockstep::emulator
