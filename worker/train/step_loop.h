// The step loop: what every slot thread of every member runs, in the same order (SPMD). All
// decisions that affect results (the gate, stopping, when to evaluate) are computed by every
// replica from identical numbers, so that replicas never disagree and nobody has to be asked.
//
// A step is atomic: the state version is the number of steps committed. The gate latches one
// decision: the reduced gradient and loss are finite and nobody has aborted; only then do
// optimizer, statistics and version move.
//
// On a device whose memory the host does not address, where every member is one slot and members
// exchange on their devices, the gate is on the device too: a step is enqueued whole, as one
// recording once it has run before, and the host runs ahead by some steps (RunAhead). What they
// came to is collected behind them, in order. A latch that is closed stays closed, so that steps
// behind one that is not finite change nothing, nor those that a failure has poisoned; and before
// anything looks at the state, all that were enqueued have run. Members' hosts agree on a stop
// every few steps.
//
// Member holds what the slots of one address space share; each slot owns its Plan, stream and
// StepScalars. Thread safety: Run is called once by each slot's thread; Stop and Abort by any
// thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/digest.h"
#include "lockstep/v1/job.pb.h"
#include "worker/collective/all_reduce.h"
#include "worker/data/batch_loader.h"
#include "worker/data/sampler.h"
#include "worker/device/device.h"
#include "worker/nn/plan.h"
#include "worker/optim/gradient_norm.h"
#include "worker/optim/optimizer.h"
#include "worker/train/recorder.h"
#include "worker/train/run_ahead.h"
#include "worker/train/spec_options.h"

namespace lockstep::train {

// The first shape of every per-leaf record that rides the step's small exchange; the moments record
// of the batch norms (Program::moments()) follows it.
struct Trailer {
  int64_t rows = 0;
  double loss_sum = 0;
  int64_t correct = 0;
  int64_t stop = 0;  // the control word: somebody was told to stop; all stop after this step
};

// Sums over the samples of the current epoch, in step order.
struct EpochSums {
  double loss_sum = 0;
  int64_t correct = 0, samples = 0;
};

class StepLoop {
 public:
  // All borrowed but the options' values; the recorder is null but at rank 0.
  struct Options {
    int rank = 0;
    std::vector<int> bounds;                // slot i has shards [bounds[i], bounds[i+1])
    std::vector<std::vector<int>> members;  // the same of all; empty: there is one
    int shards = 0;                         // of the job
    int accumulate = 1;        // microbatches of a shard; leaf = shard * accumulate + microbatch
    bool interleaved = false;  // a microbatch of all shards together, then the next
    RunLength length;
    RunLength evaluation;    // of the validation set: one "epoch" of evaluation batches
    int64_t first_step = 1;  // state version + 1
    // As the state before first_step left them; for a new run empty.
    EpochSums epoch;       // of the epoch that first_step is in
    EpochSums last_epoch;  // of the last completed one
    std::optional<v1::Evaluation> last_evaluation;
    bool has_accuracy = true;
    int64_t digest_every = 1;
    int64_t evaluate_every_steps = 0, evaluate_every_epochs = 1;
    int64_t checkpoint_every_steps = 0, checkpoint_every_epochs = 1;
    optim::ScheduleOptions schedule;
    double clip_norm = 0;  // 0: none
    bool evaluate_only = false;
    int64_t flip_bit_at_step = 0;  // fault injection: corrupts this replica after that step
    absl::Duration collective_timeout = absl::Minutes(10);
  };
  struct Parts {
    std::shared_ptr<const nn::Program> program;
    device::Device* device = nullptr;
    optim::FlatState* state = nullptr;
    nn::Operations* operations = nullptr;
    const optim::Optimizer* optimizer = nullptr;
    optim::GradientNorm* norm = nullptr;
    std::vector<nn::Plan*> plans;  // by slot
    collective::Communicator* communicator = nullptr;
    collective::Team* team = nullptr;
    collective::CanonicalAllReduce* all_reduce = nullptr;
    data::BatchLoader* train = nullptr;
    data::BatchLoader* validation = nullptr;
    data::BatchLoader* population = nullptr;  // the training set in its order, plain; or null
    Recorder* recorder = nullptr;
  };
  // Called by slot 0, with all slots waiting, when a checkpoint is due after `step`.
  class CheckpointSink {
   public:
    virtual ~CheckpointSink() = default;
    // First, on every member: the digest of its replica.
    virtual void ReplicaDigest(int64_t step, const Digest& state) = 0;
    // Then, where the replicas of all members are equal; the state may be read.
    virtual absl::Status Checkpoint(int64_t step, const EpochSums& epoch,
                                    const EpochSums& last_epoch,
                                    const std::optional<v1::Evaluation>& evaluation,
                                    absl::Span<const Digest> tensors, const Digest& parameters,
                                    const Digest& state) = 0;
  };

  static absl::StatusOr<std::unique_ptr<StepLoop>> Make(Options options, Parts parts,
                                                        CheckpointSink* checkpoints);
  ~StepLoop();

  // To the end of the run, or to a stop. On an error every slot returns it.
  absl::Status Run(int slot);

  void Stop() { stop_requested_ = true; }
  // Wakes everything that waits in the loop.
  void Abort(const absl::Status& cause);

  // After all Runs have returned:
  bool stopped() const { return stopped_; }
  const v1::JobResult& result() const { return result_; }
  const std::vector<int64_t>& shard_steps() const { return shard_steps_; }  // by shard

 private:
  struct Slot;
  StepLoop(Options options, Parts parts, CheckpointSink* checkpoints);

  absl::Status MakeGate(Slot& slot);
  absl::Status NextShards(Slot& slot);
  static absl::StatusOr<const data::Batch*> Acquire(Slot& slot, data::BatchLoader& loader,
                                                    int64_t step);
  static void TakeShards(Slot& slot, const data::Batch& batch);
  void TakeMicrobatches(Slot& slot, const data::Batch& batch);
  void KeepRecords(Slot& slot, absl::Span<const nn::ShardInput> leaves);
  data::ShardRange Microbatch(int64_t samples, int shard, int microbatch) const;
  absl::Status ForwardBackward(Slot& slot);
  absl::Status Update(Slot& slot);
  absl::Status FinishReduce(Slot& slot);
  absl::Status Gate(Slot& slot);
  void Clip(Slot& slot);
  void Optimize(Slot& slot);
  void UpdateStatistics(Slot& slot);
  // Of the step that is enqueued.
  device::Stream& StatisticsStream(Slot& slot);
  void MergeStatistics(Slot& slot);
  void UpdateStatisticsAhead(Slot& slot, device::Stream& stream);
  absl::Status Commit(Slot& slot);
  absl::Status Collect(Slot& slot);
  absl::Status TakeOutcome(Slot& slot, int64_t step);
  absl::Status MakeAgain(Slot& slot, int64_t step);
  absl::Status GatherPopulation(Slot& slot);
  void MergeRecords(const Slot& slot, void* left, const void* right) const;
  absl::Status Report(Slot& slot);
  absl::Status ReportStep(Slot& slot, int64_t step);
  absl::Status Evaluate(Slot& slot);
  absl::Status Checkpoint(Slot& slot);
  absl::Status CompareReplicas(Slot& slot);
  absl::Status DigestState(Slot& slot);
  void SumDigests(int64_t step);
  absl::Status NameNonFinite(Slot& slot);
  absl::Status Barrier(const Slot& slot);
  void ShowScalars(Slot& slot);
  const float* OnDevice(Slot& slot, const float* record);
  bool DigestDue(int64_t step) const;
  bool EvaluationDue(int64_t step) const;
  bool CheckpointDue(int64_t step) const;
  bool PopulationDue(int64_t step) const;
  bool StateIsLookedAt(Slot& slot) const;
  static bool IsStopped(const Slot& slot);
  void SummarizeTraining();  // the result's train score from the epochs' sums
  absl::Time Deadline() const { return absl::Now() + options_.collective_timeout; }

  int members() const { return parts_.communicator == nullptr ? 1 : parts_.communicator->size(); }
  // Everything of a step lies on devices, which decide it themselves.
  bool runs_ahead() const { return runs_ahead_; }
  bool CanRunAhead() const;
  // What other members' devices are waited for on, until Synchronize.
  void ExpectOthers();
  absl::Status Settle();
  absl::Status Synchronize(Slot& slot);
  absl::StatusOr<bool> AgreeToStop(Slot& slot);

  const Options options_;
  const Parts parts_;
  CheckpointSink* const checkpoints_;
  const bool runs_ahead_;
  int64_t widest_norm_ = 0;  // channels
  std::vector<std::unique_ptr<Slot>> slots_;
  std::atomic<bool> stop_requested_{false};
  std::atomic<uint32_t> non_finite_[2] = {0, 0};  // by parity of the step

  // Written by slot 0 between barriers; read by all after one.
  std::vector<Digest> tensor_digests_;
  Digest state_digest_, parameter_digest_;
  int64_t digested_step_ = -1;
  EpochSums epoch_, last_epoch_;
  std::optional<v1::Evaluation> evaluation_;
  bool stopped_ = false;
  v1::JobResult result_;
  std::vector<int64_t> shard_steps_;
  absl::Time started_;
  absl::Duration training_time_;
  int64_t trained_samples_ = 0;
};

}  // namespace lockstep::train
