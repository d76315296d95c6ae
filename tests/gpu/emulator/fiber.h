// Stacks of their own for the threads of a block, and the switch between them, known to the
// sanitizers. Used by one thread of the process at a time.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define LOCKSTEP_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LOCKSTEP_EMULATOR_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define LOCKSTEP_EMULATOR_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LOCKSTEP_EMULATOR_TSAN 1
#endif
#endif

namespace lockstep::emulator {

class Fiber {
 public:
  Fiber() = default;  // the thread of the process that switches away first
  // Runs `main`, which never returns, when first switched to.
  explicit Fiber(void (*main)());
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the fiber that runs to another.
  static void Switch(Fiber& from, Fiber& to);

  int thread = -1;  // of the block: the one it runs, or is to start

 private:
  static void Enter();

  void* stack_pointer_ = nullptr;
  void (*main_)() = nullptr;
  // For the sanitizers.
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_ = nullptr;
};

}  // namespace lockstep::emulator
