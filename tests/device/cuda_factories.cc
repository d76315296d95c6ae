// The device of the CUDA module: of a GPU, or of the emulator, whichever module is loaded.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "tests/device/device_test_fixture.h"
#include "worker/device/module/cuda_module.h"

namespace lockstep::device {
namespace {

constexpr unsigned char kPattern = 0xC7;
constexpr size_t kGuard = 512;

absl::StatusOr<std::unique_ptr<Device>> MakeDevice() {
  const absl::StatusOr<const CudaModule*> module = LoadCudaModule();
  if (!module.ok()) return module.status();
  return (*module)->make_device(0);
}

// One for all buffers, which outlive the devices under test.
Device& Allocator() {
  static auto* device = new absl::StatusOr<std::unique_ptr<Device>>(MakeDevice());
  if (!device->ok()) {
    std::fprintf(stderr, "no CUDA device: %s\n", device->status().ToString().c_str());
    std::abort();
  }
  return ***device;
}

Stream& CopyStream() {
  static auto* stream = new std::unique_ptr<Stream>(*Allocator().MakeStream());
  return **stream;
}

// [pattern][buffer][pattern]. A buffer that is guarded behind ends at a multiple of 16 bytes, so
// that most begin at none.
class GuardedDeviceMemory : public GuardedMemory {
 public:
  GuardedDeviceMemory(size_t bytes, Guard guard)
      : bytes_(bytes), begin_(kGuard + (guard == Guard::kBehind ? (16 - bytes % 16) % 16 : 0)) {
    auto memory = Allocator().Allocate(begin_ + bytes + kGuard);
    if (!memory.ok()) {
      std::fprintf(stderr, "no memory for a test: %s\n", memory.status().ToString().c_str());
      std::abort();
    }
    memory_ = *std::move(memory);
    const std::vector<unsigned char> pattern(begin_ + kGuard, kPattern);
    Allocator().Copy(CopyStream(), pattern.data(), before(), begin_);
    Allocator().Copy(CopyStream(), pattern.data(), behind(), kGuard);
    EXPECT_TRUE(CopyStream().Synchronize().ok());
  }
  void* data() override { return before() + begin_; }
  bool guards_intact() const override {
    std::vector<unsigned char> guards(begin_ + kGuard);
    Allocator().Copy(CopyStream(), before(), guards.data(), begin_);
    Allocator().Copy(CopyStream(), behind(), guards.data() + begin_, kGuard);
    if (!CopyStream().Synchronize().ok()) return false;
    return std::all_of(guards.begin(), guards.end(),
                       [](unsigned char byte) { return byte == kPattern; });
  }

 private:
  unsigned char* before() const { return static_cast<unsigned char*>(memory_->data()); }
  unsigned char* behind() const { return before() + begin_ + bytes_; }

  const size_t bytes_, begin_;
  std::unique_ptr<Memory> memory_;
};

}  // namespace

const std::vector<DeviceFactory>& DeviceFactories() {
  static const auto* factories = new std::vector<DeviceFactory>{
      {"cuda", MakeDevice, [](size_t bytes, Guard guard) -> std::unique_ptr<GuardedMemory> {
         return std::make_unique<GuardedDeviceMemory>(bytes, guard);
       }}};
  return *factories;
}

}  // namespace lockstep::device
