// Runs the calls of a Lowering: resolves values to addresses in a shard's arena and calls the
// device's kernels, with everything that does not change between steps bound when it is made.
// Internal to worker/nn. Not thread-safe; allocates nothing after Make.
//
// On CUDA every pointer below is fixed for the life of the plan, so the calls can be captured.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "worker/nn/lowering.h"
#include "worker/nn/memory_plan.h"
#include "worker/nn/plan.h"

namespace lockstep::nn {

// What is common to all shards of a call of the plan.
struct StepContext {
  device::Stream* stream = nullptr;
  optim::FlatState* state = nullptr;
  const device::StepScalars* scalars = nullptr;
  float loss_scale = 0;
  GradientSink* sink = nullptr;
  // GradientSink::LeavesStay: the sums of a batch norm's gradient are written to where they belong
  // in the leaf, and read there again.
  bool leaves_stay = false;
};

// One shard's memory.
struct Frame {
  const ShardInput* input = nullptr;
  uint8_t* arena = nullptr;
  int64_t first_row = 0;     // of the slot's, in values that hold all shards' rows together
  float* moments = nullptr;  // Program::moments() record
  float* sums = nullptr;     // of the batch norm that backward is at
  ShardResult* result = nullptr;
  float* leaf = nullptr;
};

// Where gradients of weights are computed beside the step's stream: nothing but the update waits
// for them, and of small layers neither fills a GPU. Null: nowhere.
struct Beside {
  device::Stream* stream = nullptr;
  void* scratch = nullptr;
};

// What an exchange brought: by moments slice, in the layout of Program::moments(), and the rows.
struct Merged {
  float* moments = nullptr;
  float* sums = nullptr;      // of the last kSums exchange
  std::vector<int64_t> rows;  // of the whole batch, by slice
};

// What a group of frames, one behind the other, shares beyond the arena: the kernels that read it
// can take all of the group at once.
struct Joint {
  bool data = true;       // the samples lie one behind the other
  bool labels = true;     // so do they
  bool positions = true;  // in the global batch the samples follow each other
  bool leaves = false;    // leaves stay, and are equally spaced
  int64_t leaf_stride = 0;

  static Joint Of(absl::Span<const Frame> frames, int64_t features, bool leaves_stay);
};

class Executor {
 public:
  Executor(std::shared_ptr<const Program> program, device::Device& device,
           const Operations& operations, uint64_t seed, Lowering lowering, MemoryPlan memory,
           void* scratch, Beside beside, int most_shards);

  const Lowering& lowering() const { return lowering_; }
  void Run(int call, const StepContext& context, const Merged& merged, const Frame& frame) const {
    RunGroup(lowering_.calls[call], context, merged, absl::MakeConstSpan(&frame, 1), 0);
  }
  // The call for all shards, in the order of `frames`, which share the arena: in one call of the
  // device where that gives every row and every leaf the bits that it has alone. Returns how many
  // calls it ran: a norm behind a product is made with it.
  int RunAll(int call, const StepContext& context, const Merged& merged,
             absl::Span<const Frame> frames, const Joint& joint);
  // The stream waits for what is beside it, which is announced. To be called behind a pass's last
  // call, also of one that failed.
  void JoinBeside(const StepContext& context);
  // What a call of forward made, or null; so many elements of that type.
  const void* Output(int call, const Frame& frame, int64_t* elements,
                     device::ElementType* type) const;

 private:
  // What a node's calls need besides values.
  struct NodeConstants {
    int64_t in = 0, out = 0;  // elements per sample
    device::PoolShape pool;
    device::BatchNormShape norm;
    int64_t spatial = 1, channels = 0;
    device::ElementType in_type = device::ElementType::kFp32, out_type = in_type;
    std::vector<device::StridedCopy> copies;  // by input
    bool fills = true;                        // the copies write all of the output
    bool synchronized = false;
    float epsilon = 0, rate = 0, slope = 0, alpha = 0;
    PhiloxKey key;
    std::vector<int64_t> part_outputs;  // lstm: by layer, elements per sample
    std::vector<PhiloxKey> part_keys;   // of the dropout behind it
  };

  // Frames that follow each other in the arena, at most device::kMostLeaves; their leaves are
  // `leaf_stride` apart.
  void RunGroup(const Call& call, const StepContext& context, const Merged& merged,
                absl::Span<const Frame> frames, int64_t leaf_stride) const;
  bool CanRunTogether(const Call& call, const StepContext& context, const Joint& joint) const;
  void RunLinear(const Call& call, const StepContext& context, absl::Span<const Frame> frames,
                 int64_t leaf_stride) const;
  void RunFoldedGradient(const Call& call, const StepContext& context,
                         absl::Span<const Frame> frames);
  void RunLstm(const Call& call, const StepContext& context, absl::Span<const Frame> frames,
               int64_t leaf_stride) const;
  // `product`: the call before, of what it reads, which has not been run; null: it has.
  void RunBatchNorm(const Call& call, const StepContext& context, const Merged& merged,
                    absl::Span<const Frame> frames, int64_t leaf_stride,
                    const Call* product = nullptr) const;
  void RunLayerNorm(const Call& call, const StepContext& context, absl::Span<const Frame> frames,
                    int64_t leaf_stride) const;
  void RunEmbedding(const Call& call, const StepContext& context, absl::Span<const Frame> frames,
                    int64_t leaf_stride) const;
  void RunCopy(const Call& call, const StepContext& context, const Frame& frame,
               int64_t rows) const;
  void RunLoss(const Call& call, const StepContext& context, absl::Span<const Frame> frames) const;
  void ZeroPadding(int node, const StepContext& context, float* gradient) const;
  void FinishLeaves(int node, const StepContext& context, absl::Span<const Frame> frames) const;
  bool RunsBeside(const Call& call, const StepContext& context) const {
    return call.type == CallType::kLinearBackwardWeight && beside_.stream != nullptr &&
           context.leaves_stay;
  }
  bool IsFolded(const Call& call, const StepContext& context) const {
    return call.type == CallType::kLinearBackwardWeight &&
           operations_.dense(call.node) != nullptr && context.sink->Fold() != nullptr;
  }

  float* Floats(int value, const Frame& frame) const {
    return reinterpret_cast<float*>(Bytes(value, frame));
  }
  const float* Input(int value, const Frame& frame) const {
    return value == kDataValue ? frame.input->data : Floats(value, frame);
  }
  // Of whatever type.
  const void* InputBytes(int value, const Frame& frame) const {
    return value == kDataValue ? frame.input->data : static_cast<const void*>(Bytes(value, frame));
  }
  uint8_t* Bytes(int value, const Frame& frame) const {
    return value < 0 ? nullptr
                     : frame.arena + memory_.offsets[value] +
                           memory_.of_slot[value] * frame.first_row * lowering_.value_bytes[value];
  }

  const std::shared_ptr<const Program> program_;
  device::Device& device_;
  const Operations& operations_;
  const Lowering lowering_;
  const MemoryPlan memory_;
  void* const scratch_;
  const Beside beside_;
  std::vector<NodeConstants> constants_;  // by node
  // The call that is beside, and its frames; null: none.
  const Call* beside_call_ = nullptr;
  absl::Span<const Frame> beside_frames_;
  // Of RunFoldedGradient, by shard and by part.
  std::vector<int64_t> leaf_rows_;
  std::vector<const float*> leaf_x_, leaf_dy_;
  std::vector<float*> part_dw_, part_db_;
};

}  // namespace lockstep::nn
