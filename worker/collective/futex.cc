#include "worker/collective/futex.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

#include "absl/time/clock.h"

namespace lockstep::collective {

bool FutexWait(std::atomic<uint32_t>& word, uint32_t expected, absl::Time deadline, bool shared) {
  const bool bounded = deadline != absl::InfiniteFuture();
  timespec timeout{};
  if (bounded) {
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) return false;
    timeout =
        absl::ToTimespec(left);  // relative, so a step of the wall clock costs one wait at most
  }
  const int operation = FUTEX_WAIT | (shared ? 0 : FUTEX_PRIVATE_FLAG);
  const long rc = syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, expected,
                          bounded ? &timeout : nullptr, nullptr, 0);
  return !(rc == -1 && errno == ETIMEDOUT);
}

void FutexWakeAll(std::atomic<uint32_t>& word, bool shared) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word),
          FUTEX_WAKE | (shared ? 0 : FUTEX_PRIVATE_FLAG), INT_MAX, nullptr, nullptr, 0);
}

int SpinRounds(int threads) {
  cpu_set_t set;
  const int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  return threads <= cores ? 20000 : 0;
}

}  // namespace lockstep::collective
