#include "worker/nn/plan.h"

#include <algorithm>
#include <cassert>
#include <limits>
#include <new>
#include <utility>

#include "absl/memory/memory.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "worker/nn/executor.h"

namespace lockstep::nn {
namespace {

size_t AtLeastOne(size_t bytes) { return std::max<size_t>(bytes, 1); }

int64_t SlotRows(int shards, int64_t max_rows) { return std::max(shards, 1) * max_rows; }

}  // namespace

struct Plan::Impl {
  std::shared_ptr<const Program> program;
  device::Device* device = nullptr;
  Options options;
  int64_t arena_bytes = 0;
  int64_t widest_norm = 0;
  std::unique_ptr<device::Memory> arena, scratch, moments, sums, merged_moments, merged_sums,
      results, flag;
  // Where gradients of weights are computed beside a step (Beside); null where they are not.
  std::unique_ptr<device::Stream> beside;
  std::unique_ptr<device::Memory> beside_scratch;
  std::unique_ptr<device::Memory> packed;  // of all shards what one exchange is about; or null
  // What the host reads of moments and sums; null where it can read those themselves.
  std::unique_ptr<device::Memory> host_moments, host_sums;
  // Where a TrainStep on the device leaves its results, which the host neither reads nor clears:
  // what a program's kernels leave alone they always do. Null where the host addresses all memory.
  std::unique_ptr<device::Memory> device_results;
  std::unique_ptr<Executor> train, inference;  // train is null in a plan for evaluation
  Merged merged;
  std::vector<Frame> frames;          // by position
  std::vector<const float*> records;  // by position
  StepContext context;
  Joint joint;

  // A training step that has run, by everything that its kernels' arguments follow from.
  struct Ran {
    std::vector<ShardInput> shards;
    std::vector<float*> leaves;
    const device::StepScalars* scalars = nullptr;
    float loss_scale = 0;
    const device::Stream* stream = nullptr;
    std::unique_ptr<device::Recording> recording;  // null before its second time
  };
  std::vector<std::unique_ptr<Ran>> ran;
  Ran* FindRan(absl::Span<const ShardInput> shards);

  int64_t sums_size() const { return 2 * widest_norm; }
  const float* readable_moments(int position) const {
    return (host_moments != nullptr ? host_moments : moments)->floats() +
           position * program->moments_size();
  }
  const float* readable_sums(int position) const {
    return (host_sums != nullptr ? host_sums : sums)->floats() + position * sums_size();
  }
  ShardResult* result(int position) const {
    return static_cast<ShardResult*>(results->data()) + position;
  }
  absl::Status Bind(absl::Span<const ShardInput> shards, bool training,
                    const MomentExchange::Batch* batch = nullptr, bool stepping = false);
  void BindJoint(size_t shards) {
    joint = Joint::Of(absl::MakeConstSpan(frames.data(), shards),
                      spec::ElementCount(program->graph().data_shape), context.leaves_stay);
  }
  absl::Status RunExchange(const Segment& segment, absl::Span<const ShardInput> shards,
                           MomentExchange& exchange);
  absl::Status RunCalls(Executor& executor, int calls, absl::Span<const ShardInput> shards,
                        MomentExchange* exchange);
  absl::Status MergeOnDevice(const MomentsSlice& slice, bool moments, size_t shards,
                             MomentExchange& exchange);
  absl::Status GatherAll(MomentExchange& exchange);
  void ShowMoments(size_t shards);
  absl::Status RunTraining(absl::Span<const ShardInput> shards, MomentExchange& exchange);
  absl::StatusOr<bool> IsNonFinite(const void* x, int64_t n, device::ElementType type);
  // Calls visit(call, frame) for the segment's calls before `end`, in the order that its memory was
  // planned for.
  template <class Visit>
  absl::Status Walk(const Segment& segment, int end, size_t shards, Visit visit) const;
};

template <class Visit>
absl::Status Plan::Impl::Walk(const Segment& segment, int end, size_t shards, Visit visit) const {
  end = std::min(end, segment.end);
  if (segment.layerwise) {
    for (int call = segment.begin; call < end; ++call) {
      for (size_t i = 0; i < shards; ++i) RETURN_IF_ERROR(visit(call, frames[i]));
    }
    return absl::OkStatus();
  }
  for (size_t i = 0; i < shards; ++i) {
    for (int call = segment.begin; call < end; ++call) RETURN_IF_ERROR(visit(call, frames[i]));
  }
  return absl::OkStatus();
}

Plan::Plan(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Plan::~Plan() = default;

absl::StatusOr<std::unique_ptr<Plan>> Plan::Make(std::shared_ptr<const Program> program,
                                                 device::Device& device,
                                                 const Operations& operations,
                                                 const Options& options) {
  if (options.max_rows < 1) {
    return absl::InvalidArgumentError(
        fmt::format("a plan for {} rows; accepted: at least 1", options.max_rows));
  }
  auto impl = std::make_unique<Impl>();
  Impl& p = *impl;
  p.program = program;
  p.device = &device;
  p.options = options;
  if (p.options.evaluation_rows == 0) p.options.evaluation_rows = options.max_rows;
  if (p.options.together == 0) p.options.together = static_cast<int>(options.shards.size());
  const int shards = static_cast<int>(options.shards.size());
  const size_t positions = static_cast<size_t>(std::max({shards, options.batch_shards, 1}));
  for (const MomentsSlice& slice : program->moments()) {
    p.widest_norm = std::max(p.widest_norm, slice.channels);
  }

  const bool host_addressable = device.host_addressable();
  const bool layerwise = !host_addressable, stores_bf16 = device.stores_bf16();
  Lowering train = options.training ? Lower(*program, true, layerwise, stores_bf16) : Lowering();
  Lowering inference = Lower(*program, false, layerwise, stores_bf16);
  MemoryPlan train_memory;
  if (options.training) {
    train_memory =
        PlanMemory(train, options.max_rows, SlotRows(p.options.together, options.max_rows));
  }
  MemoryPlan inference_memory =
      PlanMemory(inference, p.options.evaluation_rows, SlotRows(shards, p.options.evaluation_rows));
  p.arena_bytes = std::max(train_memory.bytes, inference_memory.bytes);

  const size_t record = sizeof(float) * static_cast<size_t>(program->moments_size());
  const size_t sums = sizeof(float) * 2 * static_cast<size_t>(p.widest_norm);
  ASSIGN_OR_RETURN(p.arena, device.Allocate(AtLeastOne(p.arena_bytes)));
  ASSIGN_OR_RETURN(p.scratch, device.Allocate(AtLeastOne(operations.scratch_bytes())));
  ASSIGN_OR_RETURN(p.moments, device.Allocate(AtLeastOne(record * positions)));
  ASSIGN_OR_RETURN(p.sums, device.Allocate(AtLeastOne(sums * positions)));
  ASSIGN_OR_RETURN(p.merged_moments, device.Allocate(AtLeastOne(record)));
  ASSIGN_OR_RETURN(p.merged_sums, device.Allocate(AtLeastOne(sums)));
  if (!host_addressable) {
    ASSIGN_OR_RETURN(p.host_moments, device.AllocateHostVisible(AtLeastOne(record * positions)));
    ASSIGN_OR_RETURN(p.host_sums, device.AllocateHostVisible(AtLeastOne(sums * positions)));
    ASSIGN_OR_RETURN(p.device_results, device.Allocate(sizeof(ShardResult) * positions));
    if (options.training && options.weights_beside) {
      ASSIGN_OR_RETURN(p.beside, device.MakeStream());
      ASSIGN_OR_RETURN(p.beside_scratch, device.Allocate(AtLeastOne(operations.scratch_bytes())));
    }
    if (options.batch_shards > shards && program->has_synchronized_norm()) {
      ASSIGN_OR_RETURN(p.packed, device.Allocate(AtLeastOne(sums * positions)));
    }
  }
  ASSIGN_OR_RETURN(p.results, device.AllocateHostVisible(sizeof(ShardResult) * positions));
  ASSIGN_OR_RETURN(p.flag, device.AllocateHostVisible(sizeof(uint32_t)));
  for (size_t i = 0; i < positions; ++i) new (p.result(static_cast<int>(i))) ShardResult();
  p.merged.moments = p.merged_moments->floats();
  p.merged.sums = p.merged_sums->floats();
  p.merged.rows.resize(program->moments().size(), 0);
  p.frames.resize(positions);
  p.records.resize(positions, nullptr);

  if (options.training) {
    Beside beside;
    if (p.beside != nullptr) beside = {p.beside.get(), p.beside_scratch->data()};
    p.train =
        std::make_unique<Executor>(program, device, operations, options.seed, std::move(train),
                                   std::move(train_memory), p.scratch->data(), beside, shards);
  }
  p.inference =
      std::make_unique<Executor>(program, device, operations, options.seed, std::move(inference),
                                 std::move(inference_memory), p.scratch->data(), Beside(), shards);
  return absl::WrapUnique(new Plan(std::move(impl)));
}

// Gives each shard its memory.
absl::Status Plan::Impl::Bind(absl::Span<const ShardInput> shards, bool training,
                              const MomentExchange::Batch* batch, bool stepping) {
  const int first = batch == nullptr ? 0 : batch->first;
  const int most = std::max({static_cast<int>(options.shards.size()), options.batch_shards, 1});
  if (batch != nullptr && (batch->shards.count > most || first + std::ssize(shards) > most)) {
    return absl::InternalError(
        fmt::format("a batch of {} shards for a plan of {}", batch->shards.count, most));
  }
  const size_t count = training ? options.together : options.shards.size();
  if (shards.size() > count) {
    return absl::InternalError(fmt::format("{} shards for a plan of {}", shards.size(), count));
  }
  int64_t first_row = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    const int64_t most = training ? options.max_rows : options.evaluation_rows;
    if (shards[i].rows < 1 || shards[i].rows > most) {
      return absl::InternalError(fmt::format("shard {} has {} rows in a plan of 1 to {}",
                                             shards[i].shard, shards[i].rows, most));
    }
    Frame& frame = frames[i];
    frame.input = &shards[i];
    frame.arena = static_cast<uint8_t*>(arena->data());
    frame.first_row = first_row;
    first_row += shards[i].rows;
    const int64_t place = first + static_cast<int64_t>(i);
    frame.moments = moments->floats() + place * program->moments_size();
    frame.sums = sums->floats() + place * sums_size();
    if (stepping && batch != nullptr && device_results != nullptr) {
      frame.result = static_cast<ShardResult*>(device_results->data()) + place;
    } else {
      frame.result = result(static_cast<int>(i));
      *frame.result = ShardResult();
    }
    frame.leaf = nullptr;
  }
  return absl::OkStatus();
}

absl::Status Plan::Impl::RunExchange(const Segment& segment, absl::Span<const ShardInput> shards,
                                     MomentExchange& exchange) {
  const MomentsSlice& slice = program->moments()[segment.moments];
  const bool moments = segment.exchange == Exchange::kMoments;
  if (!device->host_addressable() && exchange.OnDevice() != nullptr) {
    return MergeOnDevice(slice, moments, shards.size(), exchange);
  }
  const size_t bytes = sizeof(float) * 2 * static_cast<size_t>(slice.channels);
  for (size_t i = 0; i < shards.size(); ++i) {
    const int position = static_cast<int>(i);
    records[i] = moments ? readable_moments(position) + slice.offset : readable_sums(position);
    const float* record = moments ? frames[i].moments + slice.offset : frames[i].sums;
    if (records[i] != record) {
      device->Copy(*context.stream, record, const_cast<float*>(records[i]), bytes);  // our own
    }
  }
  // The exchange reads the records on the host.
  RETURN_IF_ERROR(context.stream->Synchronize());
  int64_t rows = 0;
  ASSIGN_OR_RETURN(
      const float* root,
      exchange.Combine(moments ? MomentExchange::Kind::kMoments : MomentExchange::Kind::kSums,
                       slice.channels, slice.spatial, shards,
                       absl::MakeConstSpan(records.data(), shards.size()), &rows));
  // Kept: forward's moments are needed again in backward, and kernels read fixed addresses.
  device->Copy(*context.stream, root, moments ? merged.moments + slice.offset : merged.sums, bytes);
  if (moments) merged.rows[segment.moments] = rows;
  return absl::OkStatus();
}

// An exchange on the device: records of all shards are brought together, and merged here.
absl::Status Plan::Impl::MergeOnDevice(const MomentsSlice& slice, bool of_moments, size_t shards,
                                       MomentExchange& exchange) {
  const MomentExchange::Batch& batch = *exchange.OnDevice();
  const int64_t size = 2 * slice.channels;
  int64_t stride = of_moments ? program->moments_size() : sums_size();
  float* all = of_moments ? moments->floats() + slice.offset : sums->floats();
  if (batch.elsewhere) {
    device::StridedCopy pack;
    pack.size[2] = size;
    pack.from[2] = pack.to[2] = 1;
    pack.from_row = stride;
    pack.to_row = size;
    if (shards > 0) {
      device->CopyStrided(*context.stream, pack, static_cast<int64_t>(shards),
                          all + batch.first * stride, packed->floats() + batch.first * size);
    }
    all = packed->floats();
    stride = size;
    RETURN_IF_ERROR(exchange.Gather(all, sizeof(float) * static_cast<size_t>(size)));
  }
  device::Leaves leaves;
  leaves.count = batch.shards.count;
  if (!of_moments) {
    std::vector<const float*> parts;
    for (int i = 0; i < leaves.count; ++i) parts.push_back(all + i * stride);
    device->TreeSum(*context.stream, size, parts, merged.sums);
    return absl::OkStatus();
  }
  for (int i = 1; i <= leaves.count; ++i) {
    leaves.begin[i] = batch.shards.begin[i] * slice.spatial;
  }
  float* merged_mean = merged.moments + slice.offset;
  device->MergeLeafMoments(*context.stream, slice.channels, leaves, all, all + slice.channels,
                           stride, merged_mean, merged_mean + slice.channels);
  merged.rows[&slice - program->moments().data()] = batch.shards.total();
  return absl::OkStatus();
}

// What a step came to, of all shards of the batch.
absl::Status Plan::Impl::GatherAll(MomentExchange& exchange) {
  if (!exchange.OnDevice()->elsewhere) return absl::OkStatus();
  RETURN_IF_ERROR(exchange.Gather(device_results->data(), sizeof(ShardResult)));
  if (program->moments_size() == 0) return absl::OkStatus();
  return exchange.Gather(moments->data(),
                         sizeof(float) * static_cast<size_t>(program->moments_size()));
}

// The first `calls`, in the order that their memory is planned for.
absl::Status Plan::Impl::RunCalls(Executor& executor, int calls,
                                  absl::Span<const ShardInput> shards, MomentExchange* exchange) {
  const absl::Span<const Frame> bound = absl::MakeConstSpan(frames.data(), shards.size());
  for (const Segment& segment : executor.lowering().segments) {
    if (segment.begin >= calls) break;
    const int end = std::min(segment.end, calls);
    if (segment.layerwise) {
      for (int call = segment.begin; call < end && !bound.empty();) {
        call += executor.RunAll(call, context, merged, bound, joint);
      }
    } else {
      for (const Frame& frame : bound) {
        for (int call = segment.begin; call < end; ++call) {
          executor.Run(call, context, merged, frame);
        }
      }
    }
    if (segment.end <= calls && segment.exchange != Exchange::kNone) {
      RETURN_IF_ERROR(RunExchange(segment, shards, *exchange));
    }
  }
  return absl::OkStatus();
}

// The host reads them after Synchronize.
void Plan::Impl::ShowMoments(size_t shards) {
  if (host_moments == nullptr || shards == 0 || program->moments_size() == 0) return;
  device->Copy(*context.stream, frames[0].moments, host_moments->data(),
               sizeof(float) * static_cast<size_t>(program->moments_size()) * shards);
}

absl::Status Plan::TrainStep(device::Stream& stream, optim::FlatState& state,
                             const device::StepScalars* scalars, int64_t batch,
                             absl::Span<const ShardInput> shards, GradientSink& sink,
                             MomentExchange& exchange) {
  Impl& p = *impl_;
  if (p.train == nullptr) return absl::InternalError("a training step of a plan for evaluation");
  RETURN_IF_ERROR(p.Bind(shards, /*training=*/true, exchange.OnDevice(), /*stepping=*/true));
  p.context = {&stream, &state, scalars, 1.0f / static_cast<float>(batch), &sink};
  p.context.leaves_stay = sink.LeavesStay();
  for (size_t i = 0; i < shards.size(); ++i) p.frames[i].leaf = sink.Leaf(shards[i].shard);
  p.BindJoint(shards.size());
  const bool repeats = !p.device->host_addressable() && sink.LeavesStay() && !shards.empty() &&
                       (exchange.OnDevice() != nullptr || !p.program->has_synchronized_norm());
  if (!repeats) return p.RunTraining(shards, exchange);
  Impl::Ran* const before = p.FindRan(shards);
  if (before == nullptr) return p.RunTraining(shards, exchange);  // once as it is
  if (before->recording == nullptr) {
    ASSIGN_OR_RETURN(before->recording,
                     p.device->Record(stream, [&] { return p.RunTraining(shards, exchange); }));
  }
  before->recording->Replay(stream);
  sink.Repeated();
  return absl::OkStatus();
}

absl::Status Plan::Impl::RunTraining(absl::Span<const ShardInput> shards,
                                     MomentExchange& exchange) {
  const int calls = static_cast<int>(train->lowering().calls.size());
  const absl::Status status = RunCalls(*train, calls, shards, &exchange);
  train->JoinBeside(context);
  RETURN_IF_ERROR(status);
  if (exchange.OnDevice() != nullptr) {
    RETURN_IF_ERROR(GatherAll(exchange));
  } else {
    ShowMoments(shards.size());
  }
  context.sink->EndPass();
  return absl::OkStatus();
}

// The same step as it ran before; null, and remembered, the first time.
Plan::Impl::Ran* Plan::Impl::FindRan(absl::Span<const ShardInput> shards) {
  const auto same_leaf = [](float* leaf, const Frame& frame) { return leaf == frame.leaf; };
  for (const auto& one : ran) {
    if (one->scalars == context.scalars && one->loss_scale == context.loss_scale &&
        one->stream == context.stream &&
        std::equal(one->shards.begin(), one->shards.end(), shards.begin(), shards.end()) &&
        std::equal(one->leaves.begin(), one->leaves.end(), frames.begin(), same_leaf)) {
      return one.get();
    }
  }
  // A full batch and a short one, in one of two places; accumulation has as many as passes.
  constexpr size_t kMost = 4;
  if (ran.size() >= kMost) return nullptr;
  auto& one = ran.emplace_back(std::make_unique<Ran>());
  one->shards.assign(shards.begin(), shards.end());
  for (size_t i = 0; i < shards.size(); ++i) one->leaves.push_back(frames[i].leaf);
  one->scalars = context.scalars;
  one->loss_scale = context.loss_scale;
  one->stream = context.stream;
  return nullptr;
}

absl::Status Plan::GatherMoments(device::Stream& stream, optim::FlatState& state,
                                 const device::StepScalars* scalars,
                                 absl::Span<const ShardInput> shards, MomentExchange& exchange) {
  Impl& p = *impl_;
  if (p.train == nullptr) return absl::InternalError("a training step of a plan for evaluation");
  RETURN_IF_ERROR(p.Bind(shards, /*training=*/true, exchange.OnDevice()));
  p.context = {&stream, &state, scalars, 0, nullptr};
  p.BindJoint(shards.size());
  RETURN_IF_ERROR(p.RunCalls(*p.train, p.train->lowering().forward_calls, shards, &exchange));
  p.ShowMoments(shards.size());
  return absl::OkStatus();
}

void Plan::Evaluate(device::Stream& stream, optim::FlatState& state,
                    absl::Span<const ShardInput> shards) {
  Impl& p = *impl_;
  const absl::Status bound = p.Bind(shards, /*training=*/false);
  assert(bound.ok());
  if (!bound.ok()) return;
  p.context = {&stream, &state, nullptr, 0, nullptr};
  p.BindJoint(shards.size());
  const int calls = static_cast<int>(p.inference->lowering().calls.size());
  const absl::Status ran = p.RunCalls(*p.inference, calls, shards, nullptr);
  assert(ran.ok());  // nothing is exchanged
}

const ShardResult& Plan::result(int position) const { return *impl_->result(position); }

const float* Plan::moments(int position) const { return impl_->readable_moments(position); }

const float* Plan::device_moments() const { return impl_->moments->floats(); }

const ShardResult* Plan::device_results() const {
  return static_cast<const ShardResult*>(impl_->device_results->data());
}

device::Stream* Plan::beside() const { return impl_->beside.get(); }

int Plan::most_ahead() const {
  int most = 0;
  for (const auto& one : impl_->ran) {
    if (one->recording == nullptr) continue;
    const int of_one = one->recording->most_ahead();
    most = most == 0 ? of_one : std::min(most, of_one);
  }
  return std::max(most, device::Recording::kLeastAhead);
}

absl::StatusOr<bool> Plan::Impl::IsNonFinite(const void* x, int64_t n, device::ElementType type) {
  auto* non_finite = static_cast<uint32_t*>(flag->data());
  *non_finite = 0;
  device->FlagNonFinite(*context.stream, n, x, non_finite, type);
  RETURN_IF_ERROR(context.stream->Synchronize());
  return *non_finite != 0;
}

absl::StatusOr<std::string> Plan::FindNonFinite(device::Stream& stream, optim::FlatState& state,
                                                const device::StepScalars* scalars,
                                                absl::Span<const ShardInput> shards,
                                                MomentExchange& exchange) {
  Impl& p = *impl_;
  if (p.train == nullptr) return absl::InternalError("a training step of a plan for evaluation");
  RETURN_IF_ERROR(p.Bind(shards, /*training=*/true, exchange.OnDevice()));
  p.context = {&stream, &state, scalars, 0, nullptr};
  std::string first_parameter;
  for (const optim::TensorView& tensor : p.program->parameters().tensors) {
    ASSIGN_OR_RETURN(const bool bad, p.IsNonFinite(state.parameters() + tensor.offset, tensor.size,
                                                   device::ElementType::kFp32));
    if (!bad) continue;
    first_parameter = tensor.name;
    break;
  }
  // Exchanges are collective: also with the answer known, the forward pass runs to its end.
  int first_node = std::numeric_limits<int>::max();
  const int forward = p.train->lowering().forward_calls;
  for (const Segment& segment : p.train->lowering().segments) {
    if (segment.begin >= forward) break;
    RETURN_IF_ERROR(
        p.Walk(segment, forward, shards.size(), [&](int call, const Frame& frame) -> absl::Status {
          p.train->Run(call, p.context, p.merged, frame);
          const int node = p.train->lowering().calls[call].node;
          int64_t elements = 0;
          device::ElementType type;
          const void* output = p.train->Output(call, frame, &elements, &type);
          if (output == nullptr || node >= first_node) return absl::OkStatus();
          ASSIGN_OR_RETURN(const bool bad, p.IsNonFinite(output, elements, type));
          if (bad) first_node = node;
          return absl::OkStatus();
        }));
    if (segment.end <= forward && segment.exchange != Exchange::kNone) {
      RETURN_IF_ERROR(p.RunExchange(segment, shards, exchange));
    }
  }
  if (!first_parameter.empty()) return first_parameter;
  if (first_node == std::numeric_limits<int>::max()) return std::string();
  return p.program->node_name(first_node);
}

int64_t Plan::activation_bytes() const { return impl_->arena_bytes; }

int Plan::segments() const {
  const Executor* executor = impl_->train != nullptr ? impl_->train.get() : impl_->inference.get();
  return static_cast<int>(executor->lowering().segments.size());
}

int64_t PlannedActivationBytes(const Program& program, int shards, int64_t max_rows, bool training,
                               bool gpu) {
  const int64_t slot_rows = SlotRows(shards, max_rows);
  const int64_t inference = PlanMemory(Lower(program, false, gpu, gpu), max_rows, slot_rows).bytes;
  if (!training) return inference;
  return std::max(inference, PlanMemory(Lower(program, true, gpu, gpu), max_rows, slot_rows).bytes);
}

}  // namespace lockstep::nn
