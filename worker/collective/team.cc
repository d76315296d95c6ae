#include "worker/collective/team.h"

#include <atomic>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "worker/collective/futex.h"

namespace lockstep::collective {
namespace {

constexpr uint32_t kDead = 1u << 31;  // in `epoch`; the lower bits count completed barriers

}  // namespace

struct Team::State {
  explicit State(int slots) : arrivals(slots), spin(SpinRounds(slots)) {}

  struct alignas(64) Arrival {
    std::atomic<uint32_t> epoch{0};  // the barriers at which the slot has arrived
  };
  alignas(64) std::atomic<uint32_t> count{0};
  alignas(64) std::atomic<uint32_t> epoch{0};
  std::vector<Arrival> arrivals;
  const int spin;
  absl::Mutex mutex;
  absl::Status failure ABSL_GUARDED_BY(mutex);
};

Team::Team(int slots) : slots_(slots), state_(std::make_unique<State>(slots)) {}
Team::~Team() = default;

absl::Status Team::Fail(const absl::Status& failure) {
  State& s = *state_;
  absl::Status first;
  {
    absl::MutexLock lock(&s.mutex);
    if (s.failure.ok()) s.failure = failure;
    first = s.failure;
  }
  s.epoch.fetch_or(kDead);
  FutexWakeAll(s.epoch, /*shared=*/false);
  return first;
}

void Team::Abort(const absl::Status& cause) {
  Fail(absl::AbortedError(cause.message())).IgnoreError();
}

absl::Status Team::Barrier(int slot, absl::Time deadline) {
  State& s = *state_;
  uint32_t epoch = s.epoch.load(std::memory_order_acquire);
  const auto failure = [&s] {
    absl::MutexLock lock(&s.mutex);
    return s.failure;
  };
  if (epoch & kDead) return failure();
  const uint32_t next = (epoch + 1) & ~kDead;
  s.arrivals[slot].epoch.store(next, std::memory_order_relaxed);
  if (s.count.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(slots_)) {
    s.count.store(0, std::memory_order_relaxed);
    if (!s.epoch.compare_exchange_strong(epoch, next))
      return failure();  // only an abort changes it
    if (slots_ > 1) FutexWakeAll(s.epoch, /*shared=*/false);
    return absl::OkStatus();
  }
  for (int round = 0;; ++round) {
    const uint32_t now = s.epoch.load(std::memory_order_acquire);
    if (now & kDead) return failure();
    if (now != epoch) return absl::OkStatus();
    if (round < s.spin) {
      Pause();
      continue;
    }
    if (FutexWait(s.epoch, epoch, deadline, /*shared=*/false)) continue;
    if (s.epoch.load(std::memory_order_acquire) != epoch) continue;
    std::string missing;
    for (int other = 0; other < slots_; ++other) {
      if (s.arrivals[other].epoch.load(std::memory_order_relaxed) == next) continue;
      absl::StrAppend(&missing, missing.empty() ? "" : ", ", other);
    }
    return Fail(absl::DeadlineExceededError(absl::StrCat("no answer from slot ", missing)));
  }
}

}  // namespace lockstep::collective
