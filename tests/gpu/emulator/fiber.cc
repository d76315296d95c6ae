#include "tests/gpu/emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#include "tests/gpu/emulator/report.h"

#if defined(LOCKSTEP_EMULATOR_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(LOCKSTEP_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the switch of stacks is written for x86-64"
#endif

// Saves the registers that a call preserves on the stack that runs, stores its top, and continues
// on another stack that was left in the same way.
extern "C" void lockstep_emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl lockstep_emulator_switch
.hidden lockstep_emulator_switch
.type lockstep_emulator_switch, @function
lockstep_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lockstep_emulator_switch, .-lockstep_emulator_switch
)");

namespace lockstep::emulator {
namespace {

// Touched pages only are real; sanitized frames are large.
constexpr size_t kStackBytes = size_t{256} << 10, kGuardBytes = 4096;

Fiber* switched_from = nullptr;
Fiber* switched_to = nullptr;

}  // namespace

Fiber::Fiber(void (*main)()) : main_(main) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    Fatal("no memory for the stack of an emulated thread");
  }
  bottom_ = static_cast<char*>(memory) + kGuardBytes;
  size_ = kStackBytes;
  // Tops at the same place of a page would share few lines of the cache.
  static size_t made = 0;
  const size_t skip = made++ % 61 * 64;
  // What a first switch pops: six registers and where to return to; behind it, for those who walk
  // the stack, that nobody called.
  auto** top =
      reinterpret_cast<void**>(static_cast<char*>(memory) + kGuardBytes + kStackBytes - skip) - 1;
  *--top = reinterpret_cast<void*>(&Fiber::Enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#if defined(LOCKSTEP_EMULATOR_TSAN)
  tsan_ = __tsan_create_fiber(0);
#endif
}

void Fiber::Switch(Fiber& from, Fiber& to) {
  switched_from = &from;
  switched_to = &to;
#if defined(LOCKSTEP_EMULATOR_TSAN)
  if (from.main_ == nullptr) from.tsan_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan_, 0);
#endif
#if defined(LOCKSTEP_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
  lockstep_emulator_switch(&from.stack_pointer_, to.stack_pointer_);
#if defined(LOCKSTEP_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack_, &switched_from->bottom_, &switched_from->size_);
#endif
}

void Fiber::Enter() {
#if defined(LOCKSTEP_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &switched_from->bottom_, &switched_from->size_);
#endif
  switched_to->main_();
  std::abort();
}

}  // namespace lockstep::emulator
