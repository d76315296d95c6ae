// Lets ThreadSanitizer see absl::Mutex and absl::Notification. The distribution's Abseil is built
// without it, so locks would order nothing in its eyes and every guarded field would be a race. In
// -DLOCKSTEP_SANITIZE=thread builds (and only there) these definitions come before the shared
// library's: they call the real ones and say what was acquired and released. Conditions are
// evaluated inside the library, by whichever thread unlocks: each is wrapped, so that its
// evaluation is seen under the lock.
#ifdef __SANITIZE_THREAD__

#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <string>

#include "absl/base/config.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

#define LOCKSTEP_QUOTE_INNER(x) #x
#define LOCKSTEP_QUOTE(x) LOCKSTEP_QUOTE_INNER(x)

// Also not instrumented: what the library keeps about locks, and the references that Gloo counts.
extern "C" const char* __tsan_default_suppressions() {
  return "race:libabsl_synchronization.so\n"
         "race:libabsl_graphcycles_internal.so\n"
         "race:libabsl_malloc_internal.so\n"
         "race:libgloo.so\n";
}

namespace {

// The library's own function; `name` is the mangled name after the namespaces, `qualified` is "K"
// for a const member.
template <typename Function>
Function* Real(const char* name, const char* qualified = "") {
  std::string mangled = absl::StrCat("_ZN", qualified, "4absl");
#if ABSL_OPTION_USE_INLINE_NAMESPACE == 1
  const std::string space = LOCKSTEP_QUOTE(ABSL_OPTION_INLINE_NAMESPACE_NAME);
  mangled += std::to_string(space.size()) + space;
#endif
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, (mangled + name).c_str()));
}

using Plain = void(absl::Mutex*);
using Try = bool(absl::Mutex*);
using When = void(absl::Mutex*, const absl::Condition&);
using WhenTimeout = bool(absl::Mutex*, const absl::Condition&, absl::Duration);
using WhenDeadline = bool(absl::Mutex*, const absl::Condition&, absl::Time);
using Wait = void(absl::CondVar*, absl::Mutex*);
using WaitTimeout = bool(absl::CondVar*, absl::Mutex*, absl::Duration);
using WaitDeadline = bool(absl::CondVar*, absl::Mutex*, absl::Time);
using Notify = void(absl::Notification*);
using Notified = void(const absl::Notification*);
using NotifiedTimeout = bool(const absl::Notification*, absl::Duration);
using NotifiedDeadline = bool(const absl::Notification*, absl::Time);

// On the waiter's stack. Not instrumented itself: who evaluates it has yet to acquire.
struct Seen {
  absl::Mutex* mutex;
  const absl::Condition* condition;
};

__attribute__((no_sanitize("thread"))) bool Evaluate(Seen* seen) {
  __tsan_acquire(seen->mutex);
  const bool holds = seen->condition->Eval();
  __tsan_release(seen->mutex);
  return holds;
}

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static Plain* const real = Real<Plain>("5Mutex4LockEv");
  real(this);
  __tsan_acquire(this);
}

void Mutex::Unlock() {
  static Plain* const real = Real<Plain>("5Mutex6UnlockEv");
  __tsan_release(this);
  real(this);
}

bool Mutex::TryLock() {
  static Try* const real = Real<Try>("5Mutex7TryLockEv");
  const bool locked = real(this);
  if (locked) __tsan_acquire(this);
  return locked;
}

void Mutex::ReaderLock() {
  static Plain* const real = Real<Plain>("5Mutex10ReaderLockEv");
  real(this);
  __tsan_acquire(this);
}

void Mutex::ReaderUnlock() {
  static Plain* const real = Real<Plain>("5Mutex12ReaderUnlockEv");
  __tsan_release(this);
  real(this);
}

void Mutex::LockWhen(const Condition& condition) {
  static When* const real = Real<When>("5Mutex8LockWhenERKNS0_9ConditionE");
  Seen seen{this, &condition};
  __tsan_release(this);
  real(this, Condition(&Evaluate, &seen));
  __tsan_acquire(this);
}

void Mutex::Await(const Condition& condition) {
  static When* const real = Real<When>("5Mutex5AwaitERKNS0_9ConditionE");
  Seen seen{this, &condition};
  __tsan_release(this);
  real(this, Condition(&Evaluate, &seen));
  __tsan_acquire(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static WhenTimeout* const real =
      Real<WhenTimeout>("5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  Seen seen{this, &condition};
  __tsan_release(this);
  const bool held = real(this, Condition(&Evaluate, &seen), timeout);
  __tsan_acquire(this);
  return held;
}

bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static WhenDeadline* const real =
      Real<WhenDeadline>("5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  Seen seen{this, &condition};
  __tsan_release(this);
  const bool held = real(this, Condition(&Evaluate, &seen), deadline);
  __tsan_acquire(this);
  return held;
}

void CondVar::Wait(Mutex* mutex) {
  static ::Wait* const real = Real<::Wait>("7CondVar4WaitEPNS0_5MutexE");
  __tsan_release(mutex);
  real(this, mutex);
  __tsan_acquire(mutex);
}

bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static WaitTimeout* const real =
      Real<WaitTimeout>("7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  __tsan_release(mutex);
  const bool late = real(this, mutex, timeout);
  __tsan_acquire(mutex);
  return late;
}

bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static WaitDeadline* const real =
      Real<WaitDeadline>("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  __tsan_release(mutex);
  const bool late = real(this, mutex, deadline);
  __tsan_acquire(mutex);
  return late;
}

// Who comes after the notice reads an atomic inside the library and takes no lock.
void Notification::Notify() {
  static ::Notify* const real = Real<::Notify>("12Notification6NotifyEv");
  __tsan_release(this);
  real(this);
}

void Notification::WaitForNotification() const {
  static Notified* const real = Real<Notified>("12Notification19WaitForNotificationEv", "K");
  real(this);
  __tsan_acquire(const_cast<Notification*>(this));
}

bool Notification::WaitForNotificationWithTimeout(Duration timeout) const {
  static NotifiedTimeout* const real =
      Real<NotifiedTimeout>("12Notification30WaitForNotificationWithTimeoutENS0_8DurationE", "K");
  const bool notified = real(this, timeout);
  if (notified) __tsan_acquire(const_cast<Notification*>(this));
  return notified;
}

bool Notification::WaitForNotificationWithDeadline(Time deadline) const {
  static NotifiedDeadline* const real =
      Real<NotifiedDeadline>("12Notification31WaitForNotificationWithDeadlineENS0_4TimeE", "K");
  const bool notified = real(this, deadline);
  if (notified) __tsan_acquire(const_cast<Notification*>(this));
  return notified;
}

ABSL_NAMESPACE_END
}  // namespace absl

#endif  // __SANITIZE_THREAD__
