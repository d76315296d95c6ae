// A Plan: one slot's list of kernel calls for its shards, with its memory plan. Made once per
// generation from (Program, row counts, shards held); running it allocates nothing and takes no
// lock.
//
// Forward and backward run in segments over all of the slot's shards; a segment ends at a
// `sync: batch` norm, where the moments of all shards of all slots are needed before the next
// layer. Inside a segment a shard walks through all layers while it is in cache. A segment of dense
// layers with many weights is walked the other way, layer by layer over all shards, since there the
// weights are what is to stay in cache: shards share one call, whose rows have the same bits as in
// calls of their own, and the weight gradient's kernel folds the shards' gradients before they
// leave it.
//
// On a GPU all segments are layerwise: its caches hold no shard, and a call for all shards fills it
// better than one for each.
//
// Operations (prepared dense and convolutions with their packed weights) belong to the address
// space and are shared by its plans. On CUDA a plan also owns the graph that replays a training
// step that it has run before, where no other slot takes part: everything that changes between
// steps reaches kernels through StepScalars and fixed input buffers.
//
// Not thread-safe: one thread drives one plan; plans of several slots run at once.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/device.h"
#include "worker/nn/program.h"
#include "worker/optim/flat_state.h"

namespace lockstep::nn {

// Prepared operations of every dense, conv2d and lstm node.
class Operations {
 public:
  // `rows`: every number of rows that a shard can have, in training and evaluation; `most_shards`:
  // of a slot.
  static absl::StatusOr<std::unique_ptr<Operations>> Make(std::shared_ptr<const Program> program,
                                                          device::Device& device,
                                                          absl::Span<const int64_t> rows,
                                                          int64_t most_shards);
  // Refreshes the packed weights: operation i with i % parts == part. All slots call it with their
  // part after each update; the caller puts a barrier behind it. The state's rounded parameters are
  // those of now.
  void Pack(device::Stream& stream, optim::FlatState& state, int part, int parts);

  device::Dense* dense(int node) const { return dense_[node].get(); }
  device::Conv2d* conv2d(int node) const { return conv2d_[node].get(); }
  device::Lstm* lstm(int node, int part) const { return lstm_[node][part].get(); }
  size_t scratch_bytes() const { return scratch_bytes_; }

 private:
  Operations() = default;
  std::shared_ptr<const Program> program_;
  std::vector<std::unique_ptr<device::Dense>> dense_;  // by node; null where it is none
  std::vector<std::unique_ptr<device::Conv2d>> conv2d_;
  std::vector<std::vector<std::unique_ptr<device::Lstm>>> lstm_;  // by node and layer of the lstm
  size_t scratch_bytes_ = 0;
};

// One shard's samples. Memory the device can read; valid until the step ends.
struct ShardInput {
  int shard = 0;
  int64_t rows = 0;                 // > 0: empty shards are not listed
  const float* data = nullptr;      // {rows, data shape}
  const int32_t* labels = nullptr;  // {rows}
  int64_t first_position = 0;       // of its first sample in the global batch
  friend bool operator==(const ShardInput&, const ShardInput&) = default;
};

// Where a shard's gradient goes; implemented by the canonical all-reduce. A leaf's tensor is
// written whole, then announced; calls come in shard order for every range.
class GradientSink {
 public:
  virtual ~GradientSink() = default;
  // Base of the flat vector (parameter layout) that takes this shard's gradient.
  virtual float* Leaf(int shard) = 0;
  // Elements [begin, end) of the shard's leaf are complete.
  virtual void Done(int shard, int64_t begin, int64_t end) = 0;

  // Where the slot's subtrees are wanted rather than its leaves, kernels that compute all of its
  // shards at once fold them and announce the range once, instead of calling Done. Null: leaves
  // are kept apart.
  virtual const device::LeafFold* Fold() { return nullptr; }
  virtual float* Part(int /*part*/) { return nullptr; }  // base of the flat vector, like Leaf
  virtual void DoneFolded(int64_t /*begin*/, int64_t /*end*/) {}

  // Leaves and parts have memory of their own until the step ends, so that what was written can be
  // read again; the padding in it is zero.
  virtual bool LeavesStay() const { return false; }

  // Behind the last call of a pass; and: those of the pass were made again as they were recorded,
  // announcements and this included.
  virtual void EndPass() {}
  virtual void Repeated() {}
};

// Exchange of batch-norm records between all shards of the batch, wherever they are; implemented on
// the Communicator's lane for moments. Collective: every slot of the job calls it in the same
// order.
class MomentExchange {
 public:
  virtual ~MomentExchange() = default;
  enum class Kind { kMoments, kSums };
  // Merges the records of `channels` * 2 floats: kMoments merges (rows * spatial, mean, M2), kSums
  // adds the two halves. `records[i]` belongs to shards[i].shard. Returns the merged record, valid
  // until the next call, and in *rows the rows of the whole batch.
  virtual absl::StatusOr<const float*> Combine(Kind kind, int64_t channels, int64_t spatial,
                                               absl::Span<const ShardInput> shards,
                                               absl::Span<const float* const> records,
                                               int64_t* rows) = 0;
  // Where nothing of a training step is for the host, on a device whose memory it does not address:
  // all shards of the batch at hand, which the plan then merges itself (rows; at most
  // device::kMostLeaves), the first of the call's among them, and whether others are elsewhere.
  struct Batch {
    device::Leaves shards;
    int first = 0;
    bool elsewhere = false;
  };
  virtual const Batch* OnDevice() const { return nullptr; }
  // Of shards elsewhere: in place, `records` {Batch's shards, bytes} has those of the call's;
  // behind it on the stream, all. Collective.
  virtual absl::Status Gather(void* /*records*/, size_t /*bytes*/) { return absl::OkStatus(); }
};

// Per shard results of a step or evaluation batch, in host-visible memory of the plan.
using ShardResult = device::LeafResult;

class Plan {
 public:
  ~Plan();
  struct Options {
    std::vector<int> shards;      // that the slot holds
    int64_t max_rows = 0;         // of a shard
    int64_t evaluation_rows = 0;  // of a shard in evaluation; 0: max_rows
    int together = 0;             // most shards of one TrainStep; 0: all
    int batch_shards = 0;         // of all slots, where MomentExchange::OnDevice; 0: its own
    bool training = true;         // false: evaluation only
    bool weights_beside = true;   // on a GPU, where leaves stay: their gradients on a second stream
    uint64_t seed = 0;            // of the job, for dropout
  };
  static absl::StatusOr<std::unique_ptr<Plan>> Make(std::shared_ptr<const Program> program,
                                                    device::Device& device,
                                                    const Operations& operations,
                                                    const Options& options);

  // Forward, loss and backward of one training step. `batch` is the number of samples of the global
  // batch. Fails only where the exchange does, and with Internal where `shards` has more entries or
  // rows than the plan was made for. Every slot calls it, also one whose `shards` is empty.
  absl::Status TrainStep(device::Stream& stream, optim::FlatState& state,
                         const device::StepScalars* scalars, int64_t batch,
                         absl::Span<const ShardInput> shards, GradientSink& sink,
                         MomentExchange& exchange);
  // The forward pass of a training step alone, for moments(): as in training, dropout and the
  // exchanges of synchronized norms included. Collective like TrainStep.
  absl::Status GatherMoments(device::Stream& stream, optim::FlatState& state,
                             const device::StepScalars* scalars,
                             absl::Span<const ShardInput> shards, MomentExchange& exchange);
  // Forward and loss at inference: running averages, no dropout.
  void Evaluate(device::Stream& stream, optim::FlatState& state,
                absl::Span<const ShardInput> shards);

  // Of the last call, by position in its `shards`; not of a TrainStep on the device.
  const ShardResult& result(int position) const;
  // The moments record (Program::moments()) of a shard of the last TrainStep or GatherMoments, for
  // the host when the stream is synchronized; not of a TrainStep on the device.
  const float* moments(int position) const;
  // Of a TrainStep on the device (MomentExchange::OnDevice), in its memory, of all shards of the
  // batch: moments, Program::moments_size() floats a shard; and results.
  const float* device_moments() const;
  const ShardResult* device_results() const;
  // How many training steps should be on a stream that have not run, at most: what the recordings
  // of them that there are say (device::Recording), and before there is one, its kLeastAhead.
  int most_ahead() const;
  // The stream of what runs beside the step's, which follows it when a pass ends; null: none.
  device::Stream* beside() const;

  // Repeats the forward pass of the last TrainStep's input, looking at every tensor: the name of
  // the first that has an element that is not finite ("conv1.weight", then outputs in execution
  // order), or "" where all are finite. For diagnosis, collective like TrainStep; slow.
  absl::StatusOr<std::string> FindNonFinite(device::Stream& stream, optim::FlatState& state,
                                            const device::StepScalars* scalars,
                                            absl::Span<const ShardInput> shards,
                                            MomentExchange& exchange);

  // The memory plan: bytes of the arena(s), as `explain` shows them.
  int64_t activation_bytes() const;
  int segments() const;

 private:
  struct Impl;
  explicit Plan(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// activation_bytes() of a plan for `shards` shards of at most `max_rows` samples, without making
// one; as on a GPU (layerwise, and with what is stored as bf16 there), or as on a CPU.
int64_t PlannedActivationBytes(const Program& program, int shards, int64_t max_rows, bool training,
                               bool gpu);

}  // namespace lockstep::nn
