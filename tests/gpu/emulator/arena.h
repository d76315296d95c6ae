// The memory of one emulated device: a reserved range of addresses, allocations in it with guards
// between them. Not thread-safe.
#pragma once

#include <cstddef>
#include <map>

namespace lockstep::emulator {

class Arena {
 public:
  // `bytes` may be allocated at a time.
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The rest is called while the arena is open, but for Find and what only reads numbers.
  // 256-byte aligned, filled with kGarbage; null where there is no room.
  void* Allocate(size_t bytes);
  // Ends the process where something was written outside of the allocation. False: no allocation
  // begins there.
  bool Free(void* memory);
  bool GuardsIntact(const void* memory) const;

  // The allocation that has this address, or ends at it; false: none.
  bool Find(const void* address, const char** begin, size_t* bytes) const;

  size_t capacity() const { return capacity_; }
  size_t used() const { return used_; }
  size_t allocations() const { return live_.size(); }

  // Whether its memory can be touched. Closed at first.
  void Open();
  void Close();

 private:
  struct Allocation {
    size_t bytes;
    size_t end;  // of its place, guard included
  };

  const size_t capacity_;
  size_t reserved_ = 0, used_ = 0;
  size_t touched_ = 0;  // from the base on; beyond, addresses are never accessible
  char* base_ = nullptr;
  bool open_ = false;
  std::map<size_t, Allocation> live_;  // by offset
  std::map<size_t, size_t> free_;      // places below touched_ that are free: offset to end
};

}  // namespace lockstep::emulator
