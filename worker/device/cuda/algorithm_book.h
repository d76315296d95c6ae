// Which of the vendor's algorithms a device uses for each problem (Device::algorithms).
// Thread-safe.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "worker/device/device.h"

namespace lockstep::device::cuda {

class AlgorithmBook {
 public:
  // Of a problem that was met before, or given by Replace.
  std::optional<std::string> Find(const std::string& problem) const {
    absl::MutexLock lock(&mutex_);
    const auto found = algorithms_.find(problem);
    return found == algorithms_.end() ? std::nullopt : std::optional(found->second);
  }
  void Add(const std::string& problem, std::string algorithm) {
    absl::MutexLock lock(&mutex_);
    algorithms_.emplace(problem, std::move(algorithm));
  }
  Algorithms all() const {
    absl::MutexLock lock(&mutex_);
    return algorithms_;
  }
  void Replace(Algorithms algorithms) {
    absl::MutexLock lock(&mutex_);
    algorithms_ = std::move(algorithms);
  }

 private:
  mutable absl::Mutex mutex_;
  Algorithms algorithms_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace lockstep::device::cuda
