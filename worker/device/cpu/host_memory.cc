#include "worker/device/cpu/host_memory.h"

#include <cstdint>
#include <cstdlib>

namespace lockstep::device {
namespace {

constexpr size_t kAlignment = 64;

class HostMemory : public Memory {
 public:
  HostMemory(void* block, size_t size) : block_(block), size_(size) {}
  ~HostMemory() override { std::free(block_); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  void* data() override {
    const uintptr_t address = reinterpret_cast<uintptr_t>(block_);
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  size_t size() const override { return size_; }

 private:
  void* const block_;
  const size_t size_;
};

}  // namespace

std::unique_ptr<Memory> AllocateHostMemory(size_t bytes) {
  if (bytes > PTRDIFF_MAX - kAlignment) return nullptr;    // no object can be larger
  void* const block = std::calloc(bytes + kAlignment, 1);  // large blocks stay untouched
  if (block == nullptr) return nullptr;
  return std::make_unique<HostMemory>(block, bytes);
}

}  // namespace lockstep::device
