#include "worker/data/batch_loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "common/thread_name.h"

namespace lockstep::data {
namespace {

constexpr int64_t kAlignedFloats = 16;  // 64 bytes
constexpr int64_t kPageBytes = 4096;    // the smallest of the machines we run on

int64_t RoundUp(int64_t n) { return (n + kAlignedFloats - 1) / kAlignedFloats * kAlignedFloats; }

absl::Status CheckOptions(const BatchLoaderOptions& options) {
  if (options.dataset == nullptr) return absl::InvalidArgumentError("the loader has no data set");
  if (options.batch < 1 || options.shards < 1 || options.shards > options.batch) {
    return absl::InvalidArgumentError(absl::StrCat("a batch of ", options.batch,
                                                   " samples cannot be cut into ", options.shards,
                                                   " shards; accepted: 1 to batch"));
  }
  if (options.first_shard < 0 || options.first_shard > options.last_shard ||
      options.last_shard > options.shards) {
    return absl::InvalidArgumentError(absl::StrCat("shards ", options.first_shard, " to ",
                                                   options.last_shard, " are not within 0 to ",
                                                   options.shards));
  }
  if (options.slots < 1 || options.depth < 1 || options.first_step < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("a loader with ", options.slots, " slots, depth ", options.depth,
                     " and first step ", options.first_step, "; each must be 1 or more"));
  }
  const auto channels = static_cast<size_t>(options.dataset->shape().channels);
  for (const auto& [name, values] : {std::pair("mean", &options.mean), {"std", &options.std}}) {
    if (values->size() != 1 && values->size() != channels) {
      return absl::InvalidArgumentError(absl::StrCat("data.normalize.", name, " has ",
                                                     values->size(), " values; accepted: 1 or ",
                                                     channels, " (one per channel)"));
    }
  }
  for (const double std : options.std) {
    if (!(std > 0) || !std::isfinite(std)) {
      return absl::InvalidArgumentError(
          absl::StrCat("data.normalize.std is ", std, "; accepted: a number above 0"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

BatchLoader::BatchLoader(device::Device& device, BatchLoaderOptions options)
    : device_(device), options_(std::move(options)) {}

absl::StatusOr<std::unique_ptr<BatchLoader>> BatchLoader::Make(device::Device& device,
                                                               BatchLoaderOptions options) {
  absl::Status status = CheckOptions(options);
  if (!status.ok()) return status;
  auto loader = std::unique_ptr<BatchLoader>(new BatchLoader(device, std::move(options)));
  status = loader->Allocate();
  if (!status.ok()) return status;
  loader->thread_ = std::thread(&BatchLoader::Run, loader.get());
  return loader;
}

absl::Status BatchLoader::Allocate() {
  const Dataset& dataset = *options_.dataset;
  if (options_.shuffle) order_.resize(static_cast<size_t>(dataset.samples()));

  const auto host_visible = [&](int64_t bytes, std::unique_ptr<device::Memory>* memory) {
    absl::StatusOr<std::unique_ptr<device::Memory>> made =
        device_.AllocateHostVisible(static_cast<size_t>(std::max<int64_t>(bytes, 1)));
    if (made.ok()) *memory = *std::move(made);
    return made.status();
  };

  const int64_t channels = dataset.shape().channels;
  const int64_t channel_bytes = channels * static_cast<int64_t>(sizeof(float));
  std::vector<float> mean, inv_std;
  for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
    mean.push_back(static_cast<float>(options_.mean[options_.mean.size() == 1 ? 0 : c]));
    inv_std.push_back(static_cast<float>(1.0 / options_.std[options_.std.size() == 1 ? 0 : c]));
  }
  ASSIGN_OR_RETURN(mean_, device_.Allocate(static_cast<size_t>(channel_bytes)));
  ASSIGN_OR_RETURN(inv_std_, device_.Allocate(static_cast<size_t>(channel_bytes)));
  ASSIGN_OR_RETURN(auto stream, device_.MakeStream());
  device_.Copy(*stream, mean.data(), mean_->data(), static_cast<size_t>(channel_bytes));
  device_.Copy(*stream, inv_std.data(), inv_std_->data(), static_cast<size_t>(channel_bytes));
  absl::Status status = stream->Synchronize();
  if (!status.ok()) return status;
  // Each shard has a fixed place with room for all its rows.
  int64_t floats = 0, rows = 0;
  for (int shard = options_.first_shard; shard < options_.last_shard; ++shard) {
    const ShardRange range = RangeOfShard(options_.batch, options_.shards, options_.batch, shard);
    first_floats_.push_back(floats);
    first_rows_.push_back(rows);
    // On a GPU all shards share a kernel call where they adjoin.
    const int64_t own = range.count * dataset.features();
    floats += device_.host_addressable() ? RoundUp(own) : own;
    rows += range.count;
  }
  const size_t decoded_places = options_.ahead ? 2 : 1;
  for (size_t place = 0; place < decoded_places; ++place) {
    ASSIGN_OR_RETURN(samples_[place], device_.Allocate(static_cast<size_t>(
                                          std::max<int64_t>(floats, 1) * int64_t{sizeof(float)})));
  }
  // Labels, and offsets of samples, where the kernels of a step read them.
  const size_t label_bytes = sizeof(int32_t) * static_cast<size_t>(std::max<int64_t>(rows, 1));
  const size_t offset_bytes = sizeof(int64_t) * static_cast<size_t>(std::max<int64_t>(rows, 1));
  for (size_t place = 0; place < decoded_places && !device_.host_addressable(); ++place) {
    ASSIGN_OR_RETURN(device_labels_[place], device_.Allocate(label_bytes));
  }
  // Last, so that what must be there is.
  ASSIGN_OR_RETURN(
      data_, device_.MakeResident(dataset.data(), dataset.data_bytes(), options_.spare_bytes));
  const int64_t staged_bytes = data_ != nullptr ? 0 : rows * SampleBytes();
  if (data_ == nullptr) {
    for (auto& place : places_) {
      ASSIGN_OR_RETURN(place,
                       device_.Allocate(static_cast<size_t>(std::max<int64_t>(staged_bytes, 1))));
    }
  }
  for (int slot = 0; slot < options_.slots && (options_.ahead || data_ == nullptr); ++slot) {
    auto stage = std::make_unique<Stage>();
    ASSIGN_OR_RETURN(stage->beside, device_.MakeCopyStream());
    stages_.push_back(std::move(stage));
  }
  for (int i = 0; i <= options_.depth; ++i) {
    auto buffer = std::make_unique<Buffer>();
    status = host_visible(static_cast<int64_t>(label_bytes), &buffer->labels);
    if (status.ok()) status = host_visible(static_cast<int64_t>(offset_bytes), &buffer->offsets);
    if (status.ok() && data_ == nullptr) status = host_visible(staged_bytes, &buffer->staged);
    if (!status.ok()) return status;
    for (size_t place = 0; place < first_rows_.size(); ++place) {
      buffer->batch.shards.push_back({options_.first_shard + static_cast<int>(place)});
    }
    buffers_.push_back(std::move(buffer));
  }
  return absl::OkStatus();
}

BatchLoader::~BatchLoader() {
  Stop();
  if (thread_.joinable()) thread_.join();
}

void BatchLoader::Stop() {
  ended_ = true;
  Wake();
}

void BatchLoader::Wake() {
  events_.fetch_add(1);
  events_.notify_all();
}

template <typename Condition>
void BatchLoader::WaitFor(Condition condition) {
  for (;;) {
    const int seen = events_.load();
    if (condition()) return;
    events_.wait(seen);
  }
}

absl::Duration BatchLoader::WaitTime() const { return absl::Nanoseconds(waited_.load()); }

absl::StatusOr<BatchLoader::Buffer*> BatchLoader::WaitForStep(int64_t step) {
  if (step < options_.first_step) {
    return absl::FailedPreconditionError(absl::StrCat(
        "batch ", step, " was asked for, but the loader begins at ", options_.first_step));
  }
  Buffer& buffer = BufferOf(step);
  int64_t ready = buffer.ready_step.load(std::memory_order_acquire);
  if (ready < step) {
    const absl::Time begin = options_.clock->Now();
    WaitFor([&] {
      ready = buffer.ready_step.load(std::memory_order_acquire);
      return ready >= step || ended_;
    });
    waited_ += absl::ToInt64Nanoseconds(options_.clock->Now() - begin);
    if (ready < step) return absl::CancelledError("the data loader was stopped");
  }
  if (ready > step) {
    return absl::FailedPreconditionError(absl::StrCat(
        "batch ", step, " was asked for again after it was released (now at ", ready, ")"));
  }
  return &buffer;
}

absl::StatusOr<const Batch*> BatchLoader::Acquire(device::Stream& stream, int64_t step,
                                                  int first_shard, int last_shard) {
  ASSIGN_OR_RETURN(Buffer* const buffer, WaitForStep(step));
  if (stages_.empty()) {
    Decode(stream, step, first_shard, last_shard);
    return &buffer->batch;
  }
  Stage& stage = StageOf(stream);
  const bool copies = data_ == nullptr;
  if (copies && stage.copied[step % 2] != step) {
    CopyAhead(stage, stream, step, first_shard, last_shard);
  }
  if (options_.ahead && stage.decoded[step % 2] != step) {
    DecodeAhead(stage, stream, step, first_shard, last_shard);
  }
  device_.Follow(stream, *stage.beside);
  if (!options_.ahead) Decode(stream, step, first_shard, last_shard);
  if (IsChosen(step + 1)) {
    if (copies) CopyAhead(stage, stream, step + 1, first_shard, last_shard);
    if (options_.ahead && step < options_.last_step) {
      DecodeAhead(stage, stream, step + 1, first_shard, last_shard);
    }
  }
  return &buffer->batch;
}

// Beside what comes next on the slot's stream, and behind what is on it, which may read the place.
void BatchLoader::DecodeAhead(Stage& stage, device::Stream& stream, int64_t step, int first_shard,
                              int last_shard) {
  device_.Follow(*stage.beside, stream);
  Decode(*stage.beside, step, first_shard, last_shard);
  stage.decoded[step % 2] = step;
}

void BatchLoader::Decode(device::Stream& stream, int64_t step, int first_shard, int last_shard) {
  const Buffer& buffer = BufferOf(step);
  const Dataset& dataset = *options_.dataset;
  const auto* offsets = static_cast<const int64_t*>(buffer.offsets->data());
  const auto* labels = static_cast<const int32_t*>(buffer.labels->data());
  device::Memory* const labels_out = device_labels_[PlaceOf(step)].get();
  const void* const data = data_ != nullptr ? data_->data() : places_[step % 2]->data();
  // Shards that adjoin in every respect are one call.
  const std::vector<ShardBatch>& shards = buffer.batch.shards;
  for (size_t place = 0; place < shards.size();) {
    const ShardBatch& first = shards[place];
    const int64_t first_row = first_rows_[place++];
    if (first.rows == 0 || first.shard < first_shard || first.shard >= last_shard) continue;
    int64_t rows = first.rows;
    while (place < shards.size() && shards[place].shard < last_shard &&
           shards[place].data == first.data + rows * dataset.features() &&
           first_rows_[place] == first_row + rows) {
      rows += shards[place++].rows;
    }
    device_.GatherSamples(
        stream, dataset.shape(), rows, dataset.type(), data, offsets + first_row, mean_->floats(),
        inv_std_->floats(), options_.augmentation, static_cast<uint64_t>(step),
        static_cast<uint64_t>(first.first_position),
        const_cast<float*>(first.data),  // of our own memory
        labels + first_row,
        labels_out == nullptr ? nullptr : static_cast<int32_t*>(labels_out->data()) + first_row);
  }
}

int64_t BatchLoader::SampleBytes() const {
  const Dataset& dataset = *options_.dataset;
  const int64_t element = dataset.type() == SampleType::kUint8 ? 1 : sizeof(float);
  return dataset.features() * element;
}

BatchLoader::Stage& BatchLoader::StageOf(const device::Stream& stream) {
  for (const auto& stage : stages_) {
    const device::Stream* of = nullptr;
    if (stage->of.compare_exchange_strong(of, &stream) || of == &stream) return *stage;
  }
  return *stages_.back();  // there are as many as slots
}

// The slot's samples of a batch that is chosen, to their place on the device: behind what has been
// enqueued on the slot's stream, which may read that place, and beside what comes next.
void BatchLoader::CopyAhead(Stage& stage, device::Stream& stream, int64_t step, int first_shard,
                            int last_shard) {
  const Buffer& buffer = BufferOf(step);
  const int64_t bytes = SampleBytes();
  device_.Follow(*stage.beside, stream);
  for (size_t place = 0; place < first_rows_.size(); ++place) {
    const ShardBatch& shard = buffer.batch.shards[place];
    if (shard.rows == 0 || shard.shard < first_shard || shard.shard >= last_shard) continue;
    const int64_t at = first_rows_[place] * bytes;
    device_.Copy(*stage.beside, static_cast<const uint8_t*>(buffer.staged->data()) + at,
                 static_cast<uint8_t*>(places_[step % 2]->data()) + at,
                 static_cast<size_t>(shard.rows * bytes));
  }
  stage.copied[step % 2] = step;
}

void BatchLoader::Release(int64_t step) {
  if (BufferOf(step).holders.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  ++released_;
  Wake();
}

void BatchLoader::Run() {
  NameThread("data loader");
  for (int64_t step = options_.first_step;; ++step) {
    const int64_t needed = step - options_.first_step + 1 - static_cast<int64_t>(buffers_.size());
    WaitFor([&] { return released_ >= needed || ended_; });
    if (ended_) return;
    Buffer& buffer = BufferOf(step);
    Choose(step, buffer);
    buffer.holders.store(options_.slots, std::memory_order_relaxed);
    buffer.ready_step.store(step, std::memory_order_release);
    Wake();
  }
}

void BatchLoader::Choose(int64_t step, Buffer& buffer) {
  const Dataset& dataset = *options_.dataset;
  const BatchRange range = RangeOfStep(step, dataset.samples(), options_.batch);
  if (options_.shuffle && order_epoch_ != range.epoch) {
    FillPermutation(options_.seed, range.epoch, absl::MakeSpan(order_));
    order_epoch_ = range.epoch;
  }
  buffer.batch.step = step;
  buffer.batch.epoch = range.epoch;
  buffer.batch.samples = range.count;
  for (size_t place = 0; place < first_rows_.size(); ++place) {
    ShardBatch& shard = buffer.batch.shards[place];
    shard.data = samples_[PlaceOf(step)]->floats() + first_floats_[place];
    const auto& of_device = device_labels_[PlaceOf(step)];
    shard.labels =
        static_cast<const int32_t*>((of_device != nullptr ? of_device : buffer.labels)->data()) +
        first_rows_[place];
    const ShardRange rows = RangeOfShard(options_.batch, options_.shards, range.count, shard.shard);
    shard.rows = rows.count;
    shard.first_position = rows.first;
    int64_t* offsets = static_cast<int64_t*>(buffer.offsets->data()) + first_rows_[place];
    int32_t* labels = static_cast<int32_t*>(buffer.labels->data()) + first_rows_[place];
    for (int64_t row = 0; row < rows.count; ++row) {
      const int64_t position = range.first + rows.first + row;
      const int64_t sample = options_.shuffle ? order_[static_cast<size_t>(position)] : position;
      labels[row] = dataset.labels()[sample];
      if (data_ != nullptr) {
        offsets[row] = dataset.OffsetOf(sample);
        if (dataset.mapped()) BringToMemory(sample);
      } else {
        const int64_t place_of_row = first_rows_[place] + row;
        offsets[row] = place_of_row * dataset.features();
        const int64_t bytes = SampleBytes();
        std::memcpy(static_cast<uint8_t*>(buffer.staged->data()) + place_of_row * bytes,
                    static_cast<const uint8_t*>(dataset.data()) +
                        dataset.OffsetOf(sample) * (bytes / dataset.features()),
                    static_cast<size_t>(bytes));
      }
    }
  }
}

// A slot should not wait for a disk: reads something of each page.
void BatchLoader::BringToMemory(int64_t sample) const {
  const Dataset& dataset = *options_.dataset;
  const int64_t size = SampleBytes();
  const auto* bytes = static_cast<const volatile uint8_t*>(dataset.data()) +
                      dataset.OffsetOf(sample) * (size / dataset.features());
  for (int64_t at = 0; at < size; at += kPageBytes) static_cast<void>(bytes[at]);
  static_cast<void>(bytes[size - 1]);
}

}  // namespace lockstep::data
