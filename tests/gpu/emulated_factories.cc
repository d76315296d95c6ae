// The emulated GPU under the kernel tests. A buffer ends where its allocation does, or begins
// there: what is accessed beyond is found by ASan, and what is written by the emulator.
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "tests/device/device_test_fixture.h"
#include "tests/gpu/emulator/emulator.h"
#include "worker/device/module/cuda_module.h"

namespace lockstep::device {
namespace {

constexpr unsigned char kPattern = 0xC7;

class GuardedAllocation : public GuardedMemory {
 public:
  // A buffer that is guarded behind ends at a multiple of 16 bytes, so that most begin at none.
  GuardedAllocation(size_t bytes, Guard guard)
      : begin_(guard == Guard::kBehind ? (16 - bytes % 16) % 16 : 0) {
    void* memory = nullptr;
    // Of an empty buffer there is one byte, beyond it.
    EXPECT_EQ(cudaMalloc(&memory, std::max<size_t>(begin_ + bytes, 1)), cudaSuccess);
    memory_ = static_cast<unsigned char*>(memory);
    EXPECT_EQ(cudaMemset(memory_, kPattern, begin_ + bytes), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  }
  ~GuardedAllocation() override { cudaFree(memory_); }
  void* data() override { return memory_ + begin_; }
  bool guards_intact() const override {
    std::vector<unsigned char> before(begin_);
    if (cudaMemcpy(before.data(), memory_, begin_, cudaMemcpyDefault) != cudaSuccess) return false;
    return std::count(before.begin(), before.end(), kPattern) == std::ssize(before) &&
           emulator::GuardsIntact(memory_);
  }

 private:
  const size_t begin_;
  unsigned char* memory_;
};

}  // namespace

const std::vector<DeviceFactory>& DeviceFactories() {
  static const auto* factories = new std::vector<DeviceFactory>{
      {"cuda", [] { return (*LoadCudaModule())->make_device(0); },
       [](size_t bytes, Guard guard) -> std::unique_ptr<GuardedMemory> {
         return std::make_unique<GuardedAllocation>(bytes, guard);
       }}};
  return *factories;
}

}  // namespace lockstep::device
