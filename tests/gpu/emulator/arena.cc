#include "tests/gpu/emulator/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "tests/gpu/emulator/fiber.h"
#include "tests/gpu/emulator/report.h"
#include "tests/gpu/emulator/simt.h"

#if defined(LOCKSTEP_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace lockstep::emulator {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kGuard = 4096;            // at least so many bytes between allocations
constexpr size_t kStep = size_t{2} << 20;  // huge pages: what is opened and closed is few of them
// Of freed memory, so much is filled with garbage and the rest is given back to the system.
constexpr size_t kMostRefilled = size_t{64} << 20;

size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

void Poison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if defined(LOCKSTEP_EMULATOR_ASAN)
  __asan_poison_memory_region(begin, bytes);
#endif
}
void Unpoison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#if defined(LOCKSTEP_EMULATOR_ASAN)
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

}  // namespace

Arena::Arena(size_t bytes) : capacity_(bytes) {
  // Addresses cost nothing, and holes and guards take some.
  reserved_ = RoundUp(2 * bytes + (size_t{256} << 20), kStep);
  void* const memory = mmap(nullptr, reserved_ + kStep, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) Fatal("no addresses for the memory of a device");
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const size_t skip = RoundUp(address, kStep) - address;
  base_ = static_cast<char*>(memory) + skip;
  if (skip > 0) munmap(memory, skip);
  if (skip < kStep) munmap(base_ + reserved_, kStep - skip);
  madvise(base_, reserved_, MADV_HUGEPAGE);
}

Arena::~Arena() {
  Unpoison(base_, touched_);
  munmap(base_, reserved_);
}

void* Arena::Allocate(size_t bytes) {
  if (bytes == 0 || bytes > capacity_ - used_) return nullptr;
  // A guard before the first allocation, and behind each.
  const size_t need = RoundUp(bytes, kAlignment) + kGuard;
  auto place = std::find_if(free_.begin(), free_.end(),
                            [&](const auto& f) { return f.second - f.first >= need; });
  if (place == free_.end()) {
    const bool joins = !free_.empty() && std::prev(free_.end())->second == touched_;
    const size_t begin = joins ? std::prev(free_.end())->first : touched_;
    const size_t end = RoundUp(begin + need + kGuard, kStep);
    if (end > reserved_) return nullptr;
    if (mprotect(base_ + touched_, end - touched_, PROT_READ | PROT_WRITE) != 0) return nullptr;
    FillWithGarbage(base_ + touched_, end - touched_);
    Poison(base_ + touched_, end - touched_);
    const size_t from = begin == 0 ? kGuard : begin;
    touched_ = end;
    place = free_.insert_or_assign(from, end).first;
  }
  const size_t offset = place->first, end = place->second;
  free_.erase(place);
  if (end - (offset + need) > 0) free_.emplace(offset + need, end);
  live_.emplace(offset, Allocation{bytes, offset + need});
  used_ += bytes;
  Unpoison(base_ + offset, bytes);
  FillWithGarbage(base_ + offset, bytes);
#if !defined(LOCKSTEP_EMULATOR_ASAN)
  FillWithGarbage(base_ + offset + bytes, need - bytes);
#endif
  return base_ + offset;
}

bool Arena::GuardsIntact([[maybe_unused]] const void* memory) const {
#if !defined(LOCKSTEP_EMULATOR_ASAN)
  const auto it = live_.find(static_cast<size_t>(static_cast<const char*>(memory) - base_));
  if (it == live_.end()) return false;
  const auto& [offset, allocation] = *it;
  return IsGarbage(base_ + offset - kGuard, kGuard) &&
         IsGarbage(base_ + offset + allocation.bytes, allocation.end - offset - allocation.bytes);
#else
  return true;  // nothing could be written there
#endif
}

bool Arena::Free(void* memory) {
  const auto it = live_.find(static_cast<size_t>(static_cast<char*>(memory) - base_));
  if (it == live_.end()) return false;
  const auto [offset, allocation] = *it;
  if (!GuardsIntact(memory)) {
    char text[128];
    std::snprintf(text, sizeof(text),
                  "bytes around the device allocation %p of %zu bytes have been written", memory,
                  allocation.bytes);
    Fatal(text);
  }
  if (allocation.bytes <= kMostRefilled) {
    FillWithGarbage(memory, allocation.bytes);
  } else {
    const size_t first = RoundUp(offset, kStep);
    const size_t last = (offset + allocation.bytes) / kStep * kStep;
    madvise(base_ + first, last - first, MADV_DONTNEED);
  }
  Poison(memory, RoundUp(allocation.bytes, kAlignment));
  used_ -= allocation.bytes;
  live_.erase(it);
  auto place = free_.emplace(offset, allocation.end).first;
  const auto next = std::next(place);
  if (next != free_.end() && next->first == place->second) {
    place->second = next->second;
    free_.erase(next);
  }
  if (place != free_.begin() && std::prev(place)->second == place->first) {
    std::prev(place)->second = place->second;
    free_.erase(place);
  }
  return true;
}

bool Arena::Find(const void* address, const char** begin, size_t* bytes) const {
  const char* const at = static_cast<const char*>(address);
  if (at < base_ || at >= base_ + reserved_) return false;
  auto it = live_.upper_bound(static_cast<size_t>(at - base_));
  if (it == live_.begin()) return false;
  --it;
  const size_t inside = static_cast<size_t>(at - base_) - it->first;
  if (inside > it->second.bytes) return false;
  *begin = base_ + it->first;
  *bytes = it->second.bytes;
  return true;
}

void Arena::Open() {
  if (open_) return;
  open_ = true;
  if (touched_ > 0) mprotect(base_, touched_, PROT_READ | PROT_WRITE);
}

void Arena::Close() {
  if (!open_) return;
  open_ = false;
  if (touched_ > 0) mprotect(base_, touched_, PROT_NONE);
}

}  // namespace lockstep::emulator
