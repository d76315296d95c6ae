#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "tests/device/device_test_fixture.h"
#include "worker/device/cpu/cpu_device.h"

namespace lockstep::device {
namespace {

constexpr unsigned char kPattern = 0xC7;

// [forbidden page][pages][forbidden page]; the buffer touches one of the forbidden pages.
class GuardedPages : public GuardedMemory {
 public:
  GuardedPages(size_t bytes, Guard guard) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes + page) / page * page;  // at least one byte of pattern
    total_ = inner_ + 2 * page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    begin_ = base_ + page;
    mprotect(begin_, inner_, PROT_READ | PROT_WRITE);
    std::memset(begin_, kPattern, inner_);
    data_ = guard == Guard::kBehind ? begin_ + inner_ - bytes : begin_;
  }
  ~GuardedPages() override { munmap(base_, total_); }

  void* data() override { return data_; }
  bool guards_intact() const override {
    const auto intact = [](unsigned char byte) { return byte == kPattern; };
    return std::all_of(begin_, data_, intact) &&
           std::all_of(data_ + bytes_, begin_ + inner_, intact);
  }

 private:
  size_t bytes_, inner_, total_;
  unsigned char *base_, *begin_, *data_;
};

std::unique_ptr<GuardedMemory> AllocatePages(size_t bytes, Guard guard) {
  return std::make_unique<GuardedPages>(bytes, guard);
}

}  // namespace

const std::vector<DeviceFactory>& DeviceFactories() {
  // "cpu" is the best instruction set of the machine.
  static const auto* factories = new std::vector<DeviceFactory>{
      {"cpu", [] { return MakeCpuDevice(); }, AllocatePages},
      {"cpu_avx2", [] { return MakeCpuDevice(CpuIsa::kAvx2); }, AllocatePages},
  };
  return *factories;
}

}  // namespace lockstep::device
