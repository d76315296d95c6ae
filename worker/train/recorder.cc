#include "worker/train/recorder.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/thread_name.h"

namespace lockstep::train {
namespace {

// A message costs coordinator, worker and client the same whether it tells of one step or of fifty,
// and where all run on one machine, that is time of the step. So messages are this many looks
// apart, but for what somebody waits for: the first step, evaluations, checkpoints, the end, or a
// ring that is half full.
constexpr absl::Duration kLookEvery = absl::Milliseconds(20);
constexpr int kLooks = 10;

// The length of the part of the file that holds whole lines of steps before `first_step`.
int64_t LengthBefore(const std::string& path, int64_t first_step) {
  std::ifstream file(path);
  std::string line;
  int64_t length = 0;
  while (std::getline(file, line) && !file.eof()) {
    constexpr char kPrefix[] = "{\"step\":";
    if (line.compare(0, sizeof(kPrefix) - 1, kPrefix) != 0 ||
        std::strtoll(line.c_str() + sizeof(kPrefix) - 1, nullptr, 10) >= first_step) {
      break;
    }
    length += static_cast<int64_t>(line.size()) + 1;
  }
  return length;
}

}  // namespace

Recorder::Recorder(Options options) : options_(std::move(options)), ring_(kCapacity) {
  for (Entry& entry : ring_) entry.tensors.reserve(options_.tensor_names.size());
  if (!options_.digest_path.empty()) {
    const int64_t keep = LengthBefore(options_.digest_path, options_.first_step);
    file_ = open(options_.digest_path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (file_ < 0 || ftruncate(file_, keep) != 0 || lseek(file_, keep, SEEK_SET) < 0) {
      absl::MutexLock lock(&mutex_);
      status_ = absl::ErrnoToStatus(errno, absl::StrCat("cannot write ", options_.digest_path));
      failed_ = true;
    }
  }
  thread_ = std::thread([this] { Work(); });
}

Recorder::~Recorder() {
  stop_ = true;
  thread_.join();
  if (file_ >= 0) close(file_);
}

void Recorder::PushStep(const StepRecord& record, absl::Span<const Digest> tensors) {
  const int64_t at = pushed_.load(std::memory_order_relaxed);
  while (at - taken_.load(std::memory_order_acquire) >= kCapacity)
    absl::SleepFor(absl::Milliseconds(1));
  Entry& entry = ring_[at % kCapacity];
  entry.record = record;
  entry.tensors.assign(tensors.begin(), tensors.end());
  pushed_.store(at + 1, std::memory_order_release);
}

void Recorder::PushEvaluation(const v1::Evaluation& evaluation) {
  absl::MutexLock lock(&mutex_);
  evaluations_.push_back(evaluation);
  ++evaluations_pending_;
}

absl::Status Recorder::status() {
  if (!failed_.load(std::memory_order_acquire)) return absl::OkStatus();
  absl::MutexLock lock(&mutex_);
  return status_;
}

void Recorder::Work() {
  NameThread("recorder");
  int looks = kLooks;
  for (;;) {
    const bool last = stop_;
    soon_.exchange(false, std::memory_order_acquire);  // what was pushed before it is seen below
    v1::Progress progress;
    // Before the steps: an evaluation is pushed after its step, which therefore goes out in the
    // same message or an earlier one.
    int sent_evaluations = 0;
    {
      absl::MutexLock lock(&mutex_);
      for (v1::Evaluation& evaluation : evaluations_)
        *progress.add_evaluations() = std::move(evaluation);
      sent_evaluations = static_cast<int>(evaluations_.size());
      evaluations_.clear();
    }
    const int64_t end = pushed_.load(std::memory_order_acquire);
    int64_t at = taken_.load(std::memory_order_relaxed);
    for (; at < end; ++at) {
      const Entry& entry = ring_[at % kCapacity];
      v1::StepMetrics* step = progress.add_steps();
      step->set_step(entry.record.step);
      step->set_epoch(entry.record.epoch);
      step->mutable_train()->set_loss(entry.record.loss);
      if (entry.record.has_accuracy) step->mutable_train()->set_accuracy(entry.record.accuracy);
      step->mutable_train()->set_samples(entry.record.samples);
      step->set_learning_rate(entry.record.learning_rate);
      step->set_gradient_norm(entry.record.gradient_norm);
      step->set_seconds(entry.record.seconds);
      if (entry.record.has_digests) {
        step->set_state_digest(ToHex(entry.record.state));
        WriteLine(entry);
      }
    }
    if (progress.steps_size() > 0 || sent_evaluations > 0) {
      options_.send(std::move(progress));
      looks = 0;
    }
    taken_.store(at, std::memory_order_release);
    evaluations_pending_ -= sent_evaluations;
    if (last) return;
    for (; !Due(at, looks); ++looks) absl::SleepFor(kLookEvery);
  }
}

bool Recorder::Due(int64_t taken, int looks) const {
  const int64_t waiting = pushed_.load(std::memory_order_relaxed) - taken;
  return stop_ || evaluations_pending_ > 0 || waiting >= kCapacity / 2 ||
         (waiting > 0 && (looks >= kLooks || soon_.load(std::memory_order_relaxed)));
}

void Recorder::WriteLine(const Entry& entry) {
  if (file_ < 0) return;
  line_.clear();
  absl::StrAppend(&line_, "{\"step\":", entry.record.step, ",\"state\":\"",
                  ToHex(entry.record.state), "\",\"parameters\":\"", ToHex(entry.record.parameters),
                  "\",\"tensors\":{");
  for (size_t i = 0; i < entry.tensors.size(); ++i) {
    absl::StrAppend(&line_, i == 0 ? "\"" : ",\"", options_.tensor_names[i], "\":\"",
                    ToHex(entry.tensors[i]), "\"");
  }
  line_ += "}}\n";
  for (size_t done = 0; done < line_.size();) {
    const ssize_t n = write(file_, line_.data() + done, line_.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      absl::MutexLock lock(&mutex_);
      status_ = absl::ErrnoToStatus(errno, absl::StrCat("cannot write ", options_.digest_path));
      failed_ = true;
      close(file_);
      file_ = -1;
      return;
    }
    done += static_cast<size_t>(n);
  }
}

}  // namespace lockstep::train
