// What rank 0 tells the world about a run, off the step's path: step metrics and evaluations to the
// coordinator, per-step digests to <output>/digests.jsonl. The step loop pushes fixed-size records
// into a ring that was allocated beforehand, without a lock; a thread formats, writes and sends
// them.
//
// digests.jsonl: one JSON object per line,
//   {"step":12,"state":"<32 hex>","parameters":"<32 hex>","tensors":{"conv1.weight":"<32
//   hex>",...}}
// A resumed run that writes into the folder of the earlier one keeps the lines up to its first
// step.
//
// Thread safety: Push* from one thread; the rest from any. An error of the file is kept and
// returned by status().
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "common/digest.h"
#include "lockstep/v1/worker.pb.h"

namespace lockstep::train {

struct StepRecord {
  int64_t step = 0, epoch = 0;
  double loss = 0, accuracy = 0;
  bool has_accuracy = false;
  int64_t samples = 0;
  double learning_rate = 0, gradient_norm = 0, seconds = 0;
  bool has_digests = false;
  Digest state, parameters;
};

class Recorder {
 public:
  struct Options {
    std::string digest_path;                // of digests.jsonl
    std::vector<std::string> tensor_names;  // in the order of the digests pushed
    int64_t first_step = 1;                 // lines from here on are dropped from an existing file
    // Sends a Progress, without job and generation.
    std::function<void(v1::Progress)> send;
  };
  explicit Recorder(Options options);
  ~Recorder();  // writes and sends what was pushed

  // Waits only where the thread is kCapacity records behind. `tensors` is empty without digests.
  void PushStep(const StepRecord& record, absl::Span<const Digest> tensors);
  void PushEvaluation(const v1::Evaluation& evaluation);
  // What was pushed shall not wait for more: a checkpoint should not outlive the lines of its
  // steps.
  void SendSoon() { soon_.store(true, std::memory_order_release); }

  absl::Status status();

 private:
  static constexpr int64_t kCapacity = 256;
  struct Entry {
    StepRecord record;
    std::vector<Digest> tensors;
  };
  void Work();
  // Whether what waits after `taken` records shall go out now, `looks` after something last did.
  bool Due(int64_t taken, int looks) const;
  void WriteLine(const Entry& entry);

  const Options options_;
  std::vector<Entry> ring_;
  std::atomic<int64_t> pushed_{0}, taken_{0};
  std::atomic<bool> stop_{false}, soon_{false}, failed_{false};  // failed_: status_ is set
  absl::Mutex mutex_;
  std::vector<v1::Evaluation> evaluations_ ABSL_GUARDED_BY(mutex_);
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::atomic<int> evaluations_pending_{0};
  int file_ = -1;
  std::string line_;
  std::thread thread_;
};

}  // namespace lockstep::train
