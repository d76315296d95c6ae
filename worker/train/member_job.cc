#include "worker/train/member_job.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/fs.h"
#include "common/spec/spec.h"
#include "common/status_macros.h"
#include "common/thread_name.h"
#include "google/protobuf/util/message_differencer.h"
#include "spdlog/spdlog.h"
#include "worker/collective/gpu_rendezvous.h"
#include "worker/collective/rendezvous.h"
#include "worker/data/batch_loader.h"
#include "worker/data/load.h"
#include "worker/data/moments.h"
#include "worker/data/sampler.h"
#include "worker/data/values.h"
#include "worker/device/cpu/cpu_device.h"
#include "worker/device/module/cuda_module.h"
#include "worker/train/checkpoint.h"
#include "worker/train/memory_need.h"
#include "worker/train/probe.h"
#include "worker/train/step_loop.h"

namespace lockstep::train {
namespace {

constexpr absl::Duration kConnectTimeout = absl::Seconds(8);

// Peers' failures reach us as these codes from the collectives; what we do wrong ourselves has
// others.
bool IsEcho(const absl::Status& status) {
  return absl::IsAborted(status) || absl::IsUnavailable(status) ||
         absl::IsDeadlineExceeded(status) || absl::IsCancelled(status);
}

// The members of a generation that are of one process, a GPU each, load a data set once.
absl::StatusOr<std::shared_ptr<const data::Dataset>> LoadOnce(const v1::Prepare& prepare,
                                                              const data::DataOptions& options,
                                                              data::Split split) {
  struct Entry {
    absl::Mutex loading;
    std::weak_ptr<const data::Dataset> dataset ABSL_GUARDED_BY(loading);
  };
  static absl::Mutex mutex(absl::kConstInit);
  static auto* const entries = new std::map<std::string, std::weak_ptr<Entry>>;
  std::shared_ptr<Entry> entry;
  {
    absl::MutexLock lock(&mutex);
    std::erase_if(*entries, [](const auto& one) { return one.second.expired(); });
    // What is loaded follows from the spec and from where this member finds its data.
    std::weak_ptr<Entry>& known = (*entries)[absl::StrCat(
        prepare.job(), " ", prepare.generation(), " ", static_cast<int>(split), " ", options.folder,
        " ", prepare.spec().SerializeAsString())];
    entry = known.lock();
    if (entry == nullptr) known = entry = std::make_shared<Entry>();
  }
  absl::MutexLock lock(&entry->loading);
  if (std::shared_ptr<const data::Dataset> dataset = entry->dataset.lock()) return dataset;
  ASSIGN_OR_RETURN(std::shared_ptr<const data::Dataset> dataset,
                   data::LoadDataset(RealFileSystem(), options, split));
  entry->dataset = dataset;
  // The entry lives as long as what it is of.
  const data::Dataset* const at = dataset.get();
  return std::shared_ptr<const data::Dataset>(at, [dataset = std::move(dataset), entry](auto*) {});
}

device::Algorithms FromProto(const v1::Algorithms& algorithms) {
  return {algorithms.by_problem().begin(), algorithms.by_problem().end()};
}
v1::Algorithms ToProto(const device::Algorithms& algorithms) {
  v1::Algorithms proto;
  for (const auto& [problem, algorithm] : algorithms) {
    (*proto.mutable_by_problem())[problem] = algorithm;
  }
  return proto;
}
// Of a problem that both have.
bool Differ(const v1::Algorithms& a, const device::Algorithms& b) {
  return std::any_of(b.begin(), b.end(), [&](const auto& entry) {
    const auto found = a.by_problem().find(entry.first);
    return found != a.by_problem().end() && found->second != entry.second;
  });
}

// Of a lack of memory, says what for.
absl::Status For(absl::string_view what, const absl::Status& status) {
  if (!absl::IsResourceExhausted(status)) return status;
  return absl::ResourceExhaustedError(
      absl::StrCat("no memory for ", what, ": ", absl::string_view(status.message())));
}

}  // namespace

class MemberJob::Impl : public StepLoop::CheckpointSink {
 public:
  explicit Impl(MemberOptions options) : options_(std::move(options)) {}
  // What recorded the communicator's operations goes first.
  ~Impl() override {
    loop_.reset();
    plans_.clear();
  }

  absl::StatusOr<v1::Ready> Prepare() {
    absl::StatusOr<v1::Ready> ready = MakeReady();
    if (!ready.ok()) return OrLostDevice(ready.status());
    return ready;
  }

  absl::StatusOr<v1::Ready> UseAlgorithms(const v1::Algorithms& algorithms) {
    const absl::Status status = MakePlansAgain(algorithms);
    if (!status.ok()) return OrLostDevice(status);
    absl::StatusOr<v1::Ready> ready = DescribeReady();
    if (!ready.ok()) return OrLostDevice(ready.status());
    return ready;
  }

  absl::StatusOr<v1::Ready> MakeReady() {
    const v1::Prepare& prepare = options_.prepare;
    ASSIGN_OR_RETURN(spec_, spec::Normalize(prepare.spec()));
    member_ = &prepare.members(prepare.rank());
    bounds_.assign(member_->bounds().begin(), member_->bounds().end());
    shards_ = spec_.train().shards();
    accumulate_ = spec_.train().accumulate();
    output_dir_ = prepare.output_dir().empty() ? JoinPath(options_.work_dir, prepare.job())
                                               : prepare.output_dir();
    ASSIGN_OR_RETURN(spec::Graph graph, spec::BuildGraph(spec_));
    has_accuracy_ =
        graph.loss == spec::LossType::kSoftmaxCrossEntropy || graph.target == spec::Target::kLabel;
    RETURN_IF_ERROR(LoadData(MakeValueRule(graph)));
    ASSIGN_OR_RETURN(program_, nn::Program::Compile(std::move(graph)));
    RETURN_IF_ERROR(MakeDevice());
    device_->UseAlgorithms(FromProto(prepare.algorithms()));
    RETURN_IF_ERROR(MakeOperations());
    RETURN_IF_ERROR(CheckMemory());
    absl::StatusOr<std::unique_ptr<device::Stream>> stream = device_->MakeStream();
    if (!stream.ok()) return For("a stream", stream.status());
    stream_ = *std::move(stream);
    RETURN_IF_ERROR(MakePlans());
    RETURN_IF_ERROR(For("parameters and the optimizer's state", MakeState()));
    RETURN_IF_ERROR(LoadCheckpoint());
    RETURN_IF_ERROR(OpenEnd());
    return DescribeReady();
  }

  absl::StatusOr<v1::Ready> DescribeReady() {
    const v1::Prepare& prepare = options_.prepare;
    v1::Ready ready;
    ready.set_state_version(loaded_.has_value() ? loaded_->manifest.step() : -1);
    if (loaded_.has_value()) {
      ready.set_checkpoint(loaded_->path);
      ready.mutable_notes()->Add(loaded_->notes.begin(), loaded_->notes.end());
    }
    const absl::StatusOr<std::string> probe =
        ProbeDigest(program_, *device_, *operations_, probe_rows_, spec_.train().seed());
    if (!probe.ok()) return For("the probe", probe.status());
    ready.set_fingerprint(device_->fingerprint(program_->precision()));
    ready.set_probe(*probe);
    ready.set_data_digest(data::CombinedDigest(*train_set_, *validation_set_));
    ready.set_rendezvous(rendezvous_->bytes());
    *ready.mutable_algorithms() = ToProto(device_->algorithms());
    if (!spec_.train().exact() && prepare.rank() == 0) {
      Log("INFO", "train.exact is false: the result's bits may be others on other GPUs");
    }
    Log("INFO", absl::StrCat("rank ", prepare.rank(), " of ", prepare.members_size(), ": shards ",
                             bounds_.front(), " to ", bounds_.back() - 1, " on ", plans_.size(),
                             plans_.size() == 1 ? " slot; " : " slots; ", train_set_->samples(),
                             " + ", validation_set_->samples(), " samples; ", ready.fingerprint(),
                             ", probe ", ready.probe()));
    return ready;
  }

  v1::Ended Run(const v1::Start& start) {
    v1::Ended ended;
    absl::Status status = Train(start);
    bool stopped = false;
    if (loop_ != nullptr) {
      stopped = loop_->stopped();
      *ended.mutable_result() = loop_->result();
      ended.set_state_digest(loop_->result().state_digest());
      for (int64_t n : loop_->shard_steps()) ended.add_shard_steps(n);
    }
    // Before what may take long: where a process has several members, NCCL aborts its communicators
    // together, when no recording of any of them is left.
    loop_.reset();
    plans_.clear();
    if (writer_ != nullptr) {
      const absl::Status written = writer_->Finish();
      if (status.ok()) status = written;
    }
    recorder_.reset();  // sends what is left
    status = OrLostDevice(status);
    if (!status.ok()) {
      Log(IsEcho(status) ? "WARNING" : "ERROR", std::string(status.message()));
    } else {
      Log("INFO", absl::StrCat(stopped ? "stopped at" : "completed", " step ",
                               ended.result().steps(), ", state digest ", ended.state_digest()));
    }
    if (communicator_ != nullptr) {
      const collective::Traffic traffic = communicator_->traffic();
      ended.set_gradient_bytes_sent(
          static_cast<int64_t>(traffic.exchange_bytes + traffic.gather_bytes));
    }
    if (!status.ok()) {
      ended.set_outcome(v1::Ended::ERRORED);
      ended.set_error(std::string(status.message()));
      ended.set_secondary(IsEcho(status));
    } else {
      ended.set_outcome(stopped ? v1::Ended::STOPPED : v1::Ended::COMPLETED);
    }
    return ended;
  }

  absl::Status broken() const { return broken_; }

  void Stop() {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
    if (running_ != nullptr) running_->Stop();
  }

  void Abort(const std::string& reason) { Fail(absl::AbortedError(reason)); }

  // ---- StepLoop::CheckpointSink: slot 0, all others waiting.
  void ReplicaDigest(int64_t step, const Digest& state) override {
    v1::WorkerMessage message;
    v1::ReplicaDigest* digest = message.mutable_digest();
    digest->set_job(options_.prepare.job());
    digest->set_generation(options_.prepare.generation());
    digest->set_step(step);
    digest->set_state_digest(ToHex(state));
    options_.send(std::move(message));
  }

  absl::Status Checkpoint(int64_t step, const EpochSums& epoch, const EpochSums& last_epoch,
                          const std::optional<v1::Evaluation>& evaluation,
                          absl::Span<const Digest> tensors, const Digest& parameters,
                          const Digest& state) override {
    if (options_.prepare.rank() != 0) return absl::OkStatus();
    CheckpointSnapshot snapshot;
    v1::CheckpointManifest& manifest = snapshot.manifest;
    manifest.set_format_version(1);
    manifest.set_job(options_.prepare.job());
    *manifest.mutable_spec() = spec_;
    manifest.set_step(step);
    manifest.set_fingerprint(device_->fingerprint(program_->precision()));
    manifest.set_data_digest(data::CombinedDigest(*train_set_, *validation_set_));
    manifest.set_parameter_digest(ToHex(parameters));
    manifest.set_state_digest(ToHex(state));
    manifest.set_epoch_loss_sum(epoch.loss_sum);
    manifest.set_epoch_correct(epoch.correct);
    manifest.set_epoch_samples(epoch.samples);
    manifest.set_last_epoch_loss_sum(last_epoch.loss_sum);
    manifest.set_last_epoch_correct(last_epoch.correct);
    manifest.set_last_epoch_samples(last_epoch.samples);
    if (evaluation.has_value()) *manifest.mutable_last_evaluation() = *evaluation;
    manifest.set_version(options_.version);
    *manifest.mutable_algorithms() = ToProto(device_->algorithms());
    const auto& named = state_->named();
    for (size_t i = 0; i < named.size(); ++i) {
      v1::TensorDigest* tensor = manifest.add_tensors();
      tensor->set_name(named[i].name);
      tensor->set_digest(ToHex(tensors[i]));
      snapshot.tensors.push_back(
          {named[i].name, *named[i].shape, std::vector<float>(named[i].size)});
      device_->Copy(*stream_, named[i].data, snapshot.tensors.back().values.data(),
                    sizeof(float) * static_cast<size_t>(named[i].size));
    }
    RETURN_IF_ERROR(stream_->Synchronize());
    return writer_->Start(std::move(snapshot));
  }

 private:
  // What goes wrong on a device that is lost has that cause, whatever it looks like.
  absl::Status OrLostDevice(const absl::Status& status) {
    if (status.ok() || device_ == nullptr) return status;
    broken_ = device_->Check();
    return broken_.ok() ? status : broken_;
  }

  absl::Status MakeDevice() {
    if (spec_.resources().device() != "cuda") {
      ASSIGN_OR_RETURN(device_, device::MakeCpuDevice());
      return absl::OkStatus();
    }
    ASSIGN_OR_RETURN(const device::CudaModule* module, device::LoadCudaModule());
    ASSIGN_OR_RETURN(device_, module->make_device(options_.gpu));
    return absl::OkStatus();
  }

  absl::Status LoadData(const data::ValueRule& rule) {
    // Synthetic data has no path.
    std::string folder = options_.data_path.empty() ? spec_.data().path() : options_.data_path;
    if (!folder.empty()) {
      ASSIGN_OR_RETURN(folder, spec::ResolveDataPath(folder));
    }
    const data::DataOptions options = MakeDataOptions(spec_, folder);
    ASSIGN_OR_RETURN(train_set_, LoadOnce(options_.prepare, options, data::Split::kTrain));
    ASSIGN_OR_RETURN(validation_set_,
                     LoadOnce(options_.prepare, options, data::Split::kValidation));
    if (train_set_->type() != validation_set_->type()) {
      return absl::InvalidArgumentError(absl::StrCat(
          validation_set_->source(), ": its features are ",
          validation_set_->type() == data::SampleType::kUint8 ? "uint8" : "float32",
          ", those of training are not; accepted: one type, which one normalization fits"));
    }
    const v1::NormalizeSpec& normalize = spec_.data().normalize();
    mean_.assign(normalize.mean().begin(), normalize.mean().end());
    std_.assign(normalize.std().begin(), normalize.std().end());
    if (normalize.compute()) {
      ASSIGN_OR_RETURN(data::ChannelMoments moments,
                       data::ComputeMoments(RealFileSystem(), data::CacheFolder(), *train_set_));
      Log("INFO", absl::StrCat("normalize: mean [", absl::StrJoin(moments.mean, ", "), "], std [",
                               absl::StrJoin(moments.std, ", "), "] of the training set",
                               moments.cached ? ", from the cache" : ""));
      mean_ = std::move(moments.mean);
      std_ = std::move(moments.std);
    }
    RETURN_IF_ERROR(data::CheckValues(*train_set_, mean_, std_, rule));
    RETURN_IF_ERROR(data::CheckValues(*validation_set_, mean_, std_, rule));
    length_ = MakeRunLength(spec_, train_set_->samples());
    evaluation_.samples = validation_set_->samples();
    evaluation_.batch = spec_.train().evaluate().batch();
    evaluation_.steps_per_epoch = data::StepsPerEpoch(evaluation_.samples, evaluation_.batch);
    evaluation_.total_steps = evaluation_.steps_per_epoch;
    return absl::OkStatus();
  }

  Rows AllRows() const { return RowsOf(Cut(), length_.samples, evaluation_.samples); }

  absl::Status MakeOperations() {
    const Rows rows = AllRows();
    probe_rows_ = rows.probe;
    int most_shards = 0;
    for (size_t i = 0; i + 1 < bounds_.size(); ++i) {
      most_shards = std::max(most_shards, bounds_[i + 1] - bounds_[i]);
    }
    auto operations = nn::Operations::Make(program_, *device_, rows.all, most_shards);
    if (!operations.ok()) return For("the layers' weights", operations.status());
    operations_ = *std::move(operations);
    return absl::OkStatus();
  }

  // With the job's algorithms instead of those that were chosen here.
  absl::Status MakePlansAgain(const v1::Algorithms& algorithms) {
    plans_.clear();
    operations_.reset();
    device_->UseAlgorithms(FromProto(algorithms));
    RETURN_IF_ERROR(MakeOperations());
    return MakePlans();
  }

  absl::Status MakePlans() {
    const Rows rows = AllRows();
    for (size_t i = 0; i + 1 < bounds_.size(); ++i) {
      nn::Plan::Options options;
      for (int shard = bounds_[i]; shard < bounds_[i + 1]; ++shard) options.shards.push_back(shard);
      if (collective::UsesNccl(Rendezvous())) options.batch_shards = shards_;
      options.max_rows = rows.training;
      options.evaluation_rows = rows.evaluation;
      if (accumulate_ > 1 && !interleaved()) options.together = 1;
      options.training = !options_.evaluate_only;
      options.seed = spec_.train().seed();
      auto plan = nn::Plan::Make(program_, *device_, *operations_, options);
      if (!plan.ok()) return For(absl::StrCat("the plan of slot ", i), plan.status());
      plans_.push_back(*std::move(plan));
    }
    return absl::OkStatus();
  }

  JobCut Cut() const {
    JobCut cut{length_.batch, evaluation_.batch, shards_, accumulate_, {}, options_.prepare.rank()};
    for (const v1::Member& member : options_.prepare.members()) {
      cut.members.emplace_back(member.bounds().begin(), member.bounds().end());
    }
    return cut;
  }

  // Of a job that does not fit beside what else is on the GPU, says what would.
  absl::Status CheckMemory() {
    const device::Device::Room room = device_->room();
    if (room.total == 0) return absl::OkStatus();
    MemoryFacts facts;
    facts.program = program_.get();
    facts.samples = length_.samples;
    facts.evaluation_samples = evaluation_.samples;
    facts.optimizer_vectors =
        static_cast<int>(optim::SlotNames(MakeCoefficients(spec_.optimizer()).type).size());
    facts.training = !options_.evaluate_only;
    facts.exchanges_on_gpu = collective::UsesNccl(Rendezvous());
    facts.stream_bytes = static_cast<int64_t>(device_->stream_bytes());
    facts.data_bytes = static_cast<int64_t>(train_set_->data_bytes());
    facts.scratch = [this](const std::vector<int64_t>& rows, int most) -> absl::StatusOr<int64_t> {
      ASSIGN_OR_RETURN(const auto operations, nn::Operations::Make(program_, *device_, rows, most));
      return static_cast<int64_t>(operations->scratch_bytes());
    };
    const auto free = static_cast<int64_t>(room.free);
    ASSIGN_OR_RETURN(const MemoryNeed need, NeedWithin(Cut(), facts, free));
    spare_bytes_ = static_cast<size_t>(need.behind_data + need.staging);
    if (need.total <= free) return absl::OkStatus();
    std::vector<std::string> parts;
    for (const MemoryNeed::Part& part : need.parts) {
      if (parts.size() == 3) break;
      parts.push_back(absl::StrCat(part.what, " ", SizeText(part.bytes)));
    }
    // What an allocator loses, and CUDA graphs take, is not counted: advice leaves room for it.
    const int64_t uncounted = std::min(int64_t{32} << 20, free / 256);
    const std::string fits = WhatFits(Cut(), facts, free - uncounted);
    return absl::ResourceExhaustedError(absl::StrCat(
        device_->name(), " has not enough memory: this needs ", SizeText(need.total), ", ",
        SizeText(free), " of ", SizeText(static_cast<int64_t>(room.total)), " are free; most is ",
        absl::StrJoin(parts, ", "), "; ",
        fits.empty() ? "no smaller batch would fit, on more GPUs either: use GPUs with more memory"
                     : absl::StrCat("what fits: ", fits)));
  }

  // A synchronized norm needs the moments of all shards' microbatches before any goes on.
  bool interleaved() const { return program_->has_synchronized_norm(); }

  absl::Status MakeState() {
    const device::OptimizerCoefficients coefficients = MakeCoefficients(spec_.optimizer());
    ASSIGN_OR_RETURN(
        state_, optim::FlatState::Make(*device_, program_->parameters(), program_->statistics(),
                                       coefficients.type, program_->precision()));
    optimizer_ = std::make_unique<optim::Optimizer>(coefficients, program_->parameters());
    ASSIGN_OR_RETURN(norm_, optim::GradientNorm::Make(*device_, program_->parameters()));
    RETURN_IF_ERROR(optim::InitializeOnDevice(*device_, *stream_, program_->parameters(),
                                              spec_.train().seed(), state_->parameters()));
    return optim::InitializeOnDevice(*device_, *stream_, program_->statistics(),
                                     spec_.train().seed(), state_->statistics());
  }

  // The checkpoint to go on from, where this member can see it. Only members that find it offer it.
  absl::Status LoadCheckpoint() {
    const std::string& from = options_.prepare.resume_from();
    if (from.empty()) return absl::OkStatus();
    std::vector<CheckpointTensorSpec> expected;
    for (const auto& named : state_->named()) expected.push_back({named.name, *named.shape});
    absl::StatusOr<LoadedCheckpoint> loaded =
        LoadNewestCheckpoint(RealFileSystem(), from, expected);
    if (absl::IsNotFound(loaded.status()) && !options_.evaluate_only) return absl::OkStatus();
    if (!loaded.ok()) return loaded.status();
    loaded_ = *std::move(loaded);
    for (const std::string& note : loaded_->notes) Log("WARNING", note);
    RETURN_IF_ERROR(CheckSameRun(loaded_->manifest));
    const v1::Algorithms& algorithms = loaded_->manifest.algorithms();
    const bool differ = spec_.train().exact() && Differ(algorithms, device_->algorithms());
    return differ ? MakePlansAgain(algorithms) : absl::OkStatus();
  }

  // A run goes on only where every later step is the one that the undisturbed run would have made.
  absl::Status CheckSameRun(const v1::CheckpointManifest& manifest) {
    if (options_.evaluate_only) return absl::OkStatus();
    const v1::TrainSpec& then = manifest.spec().train();
    const v1::TrainSpec& now = spec_.train();
    const auto differs = [&](const char* field, const auto& a, const auto& b) -> absl::Status {
      if (a == b) return absl::OkStatus();
      return absl::FailedPreconditionError(absl::StrCat("cannot go on from ", loaded_->path,
                                                        ": it was made with ", field, " ", a,
                                                        ", the spec says ", b));
    };
    RETURN_IF_ERROR(differs("train.batch", then.batch(), now.batch()));
    RETURN_IF_ERROR(differs("train.shards", then.shards(), now.shards()));
    RETURN_IF_ERROR(differs("train.seed", then.seed(), now.seed()));
    // A checkpoint of a version before there was one has 0.
    RETURN_IF_ERROR(differs("train.accumulate", std::max(1, then.accumulate()), now.accumulate()));
    // As accumulate.
    const auto precision = [](const v1::TrainSpec& train) {
      return train.precision().empty() ? std::string("fp32") : train.precision();
    };
    RETURN_IF_ERROR(differs("train.precision", precision(then), precision(now)));
    const std::string here = device_->fingerprint(program_->precision());
    if (now.exact() && manifest.fingerprint() != here) {
      const bool allowed = spec_.resources().device() == "cuda";
      return absl::FailedPreconditionError(absl::StrCat(
          "cannot go on from ", loaded_->path, ": it is of a device that computes otherwise (",
          manifest.fingerprint(), ") than this worker's (", here, "); use the same kind of device",
          allowed ? ", or train.exact: false, whose bits are another run's" : ""));
    }
    // Both are complete: what a field is by default is written there.
    const auto same = [&](const char* part, const google::protobuf::Message& a,
                          const google::protobuf::Message& b) -> absl::Status {
      google::protobuf::util::MessageDifferencer differencer;
      std::string report;
      differencer.ReportDifferencesToString(&report);
      if (differencer.Compare(a, b)) return absl::OkStatus();
      return absl::FailedPreconditionError(
          absl::StrCat("cannot go on from ", loaded_->path, ": its ", part,
                       " is not the spec's: ", report.substr(0, report.find('\n'))));
    };
    RETURN_IF_ERROR(same("model", manifest.spec().model(), spec_.model()));
    RETURN_IF_ERROR(same("loss", manifest.spec().loss(), spec_.loss()));
    RETURN_IF_ERROR(same("optimizer", manifest.spec().optimizer(), spec_.optimizer()));
    RETURN_IF_ERROR(same("schedule", manifest.spec().schedule(), spec_.schedule()));
    const v1::DataSpec &data_then = manifest.spec().data(), &data_now = spec_.data();
    RETURN_IF_ERROR(same("data.normalize", data_then.normalize(), data_now.normalize()));
    RETURN_IF_ERROR(same("data.augment", data_then.augment(), data_now.augment()));
    if (spec_.schedule().type() == "cosine") {  // which falls over the whole run
      const int64_t steps = MakeRunLength(manifest.spec(), train_set_->samples()).total_steps;
      RETURN_IF_ERROR(differs("a cosine schedule of steps", steps, length_.total_steps));
    }
    const std::string data = data::CombinedDigest(*train_set_, *validation_set_);
    if (manifest.data_digest() != data) {
      return absl::FailedPreconditionError(absl::StrCat(
          "cannot go on from ", loaded_->path, ": it was made with other data (digest ",
          manifest.data_digest(), ", here ", data, ")"));
    }
    if (manifest.step() > length_.total_steps) {
      return absl::FailedPreconditionError(
          absl::StrCat("cannot go on from ", loaded_->path, ": it is at step ", manifest.step(),
                       ", beyond the spec's ", length_.total_steps));
    }
    return absl::OkStatus();
  }

  // Without its sizes.
  collective::RendezvousOptions Rendezvous() const {
    collective::RendezvousOptions rendezvous;
    rendezvous.rank = options_.prepare.rank();
    rendezvous.address = options_.address;
    rendezvous.slots = static_cast<int>(bounds_.size()) - 1;
    for (const v1::Member& m : options_.prepare.members()) {
      rendezvous.members.push_back({m.worker(), m.host_id(), m.gpu()});
    }
    rendezvous.gpu = options_.gpu;
    rendezvous.gradients = options_.gradients;
    return rendezvous;
  }

  absl::Status OpenEnd() {
    const v1::Prepare& prepare = options_.prepare;
    placement_.leaves = shards_ * accumulate_;
    if (interleaved()) placement_.interleaved = accumulate_;
    placement_.in_passes = accumulate_ > 1;
    placement_.exact = spec_.train().exact();
    for (const v1::Member& m : prepare.members()) {
      placement_.bounds.emplace_back(m.bounds().begin(), m.bounds().end());
      for (int& bound : placement_.bounds.back()) bound *= accumulate_;
    }
    collective::RendezvousOptions rendezvous = Rendezvous();
    const int64_t size = program_->parameters().size;
    const bool addressable = device_->host_addressable();
    rendezvous.shared_bytes =
        collective::CanonicalAllReduce::SharedBytes(placement_, size, addressable);
    rendezvous.staging_bytes =
        collective::CanonicalAllReduce::StagingBytes(placement_, prepare.rank(), size);
    ASSIGN_OR_RETURN(rendezvous_, collective::OpenRendezvous(rendezvous));
    return absl::OkStatus();
  }

  absl::Status Train(const v1::Start& start) {
    const auto aborted = [this] {
      absl::MutexLock lock(&mutex_);
      return failure_;
    };
    ASSIGN_OR_RETURN(communicator_,
                     rendezvous_->Connect({start.rendezvous().begin(), start.rendezvous().end()},
                                          absl::Now() + kConnectTimeout, aborted));
    {
      absl::MutexLock lock(&mutex_);
      connected_ = communicator_.get();
      RETURN_IF_ERROR(failure_);
    }
    team_ = std::make_unique<collective::Team>(static_cast<int>(plans_.size()));
    std::vector<int64_t> offsets;
    for (const optim::TensorView& tensor : program_->parameters().tensors)
      offsets.push_back(tensor.offset);
    const int64_t size = program_->parameters().size;
    auto all_reduce = collective::CanonicalAllReduce::Make(
        *device_, communicator_.get(), team_.get(), placement_, size,
        collective::MakeBuckets(size, offsets,
                                device_->host_addressable() ? kBucketBytes : kGpuBucketBytes));
    if (!all_reduce.ok()) return For("gradients", all_reduce.status());
    all_reduce_ = *std::move(all_reduce);
    v1::CheckpointManifest from;
    RETURN_IF_ERROR(ShareState(start.source_rank(), &from));
    RETURN_IF_ERROR(MakeLoop(from));
    RETURN_IF_ERROR(Meet());
    {
      absl::MutexLock lock(&mutex_);
      running_ = loop_.get();
      if (stop_) loop_->Stop();
      if (!failure_.ok()) loop_->Abort(failure_);
    }
    std::vector<std::thread> threads;
    for (int slot = 1; slot < team_->slots(); ++slot) {
      threads.emplace_back([this, slot] { RunSlot(slot); });
    }
    RunSlot(0);
    for (std::thread& thread : threads) thread.join();
    absl::MutexLock lock(&mutex_);
    running_ = nullptr;
    return failure_;
  }

  // Allocating and freeing may wait for the other GPUs of the process, where kernels of NCCL that
  // run already would wait for ours: nobody begins before all have their memory.
  absl::Status Meet() {
    if (!communicator_->on_device()) return absl::OkStatus();
    const char here = 1;
    std::string all(communicator_->size(), '\0');
    ASSIGN_OR_RETURN(const collective::Ticket ticket,
                     communicator_->EnqueueAllGather(nullptr, collective::Lane::kGradients, &here,
                                                     sizeof(here), all.data()));
    return communicator_->Wait(ticket, absl::Now() + options_.collective_timeout);
  }

  void RunSlot(int slot) {
    const std::string name = ThreadName();
    NameThread(absl::StrCat("slot ", slot));
    const absl::Status status = loop_->Run(slot);
    NameThread(name);
    if (!status.ok()) {
      Fail(absl::Status(status.code(),
                        absl::StrCat("slot ", slot, ": ", absl::string_view(status.message()))));
    }
  }

  // The first failure is kept, but one of our own replaces the echo of a peer's.
  void Fail(const absl::Status& cause) {
    absl::MutexLock lock(&mutex_);
    if (failure_.ok() || (IsEcho(failure_) && !IsEcho(cause))) failure_ = cause;
    if (connected_ != nullptr) connected_->Abort(cause);
    if (running_ != nullptr) running_->Abort(cause);
  }

  // Members whose state is behind take the source's, and with it the manifest of its checkpoint.
  absl::Status ShareState(int source, v1::CheckpointManifest* manifest) {
    if (source < 0) return absl::OkStatus();
    const bool is_source = source == options_.prepare.rank();
    if (is_source) {
      const auto& named = state_->named();
      for (size_t i = 0; i < named.size(); ++i) {
        const std::vector<float>& values = loaded_->tensors[i];
        device_->Copy(*stream_, values.data(), named[i].data, values.size() * sizeof(float));
      }
      RETURN_IF_ERROR(stream_->Synchronize());
      *manifest = loaded_->manifest;
      Log("INFO", absl::StrCat("going on from ", loaded_->path, ", step ", manifest->step()));
    }
    std::string bytes = is_source ? manifest->SerializeAsString() : "";
    uint64_t length = bytes.size();
    RETURN_IF_ERROR(Broadcast(source, &length, sizeof(length)));
    if (length > (64u << 20))
      return absl::InternalError("a manifest of more than 64 MiB was announced");
    bytes.resize(length);
    RETURN_IF_ERROR(Broadcast(source, bytes.data(), bytes.size()));
    if (!manifest->ParseFromString(bytes)) return absl::InternalError("a manifest did not parse");
    const int64_t size = program_->parameters().size;
    RETURN_IF_ERROR(BroadcastState(source, state_->parameters(), size));
    for (int i = 0; i < state_->slot_count(); ++i) {
      RETURN_IF_ERROR(BroadcastState(source, state_->slot(i), size));
    }
    RETURN_IF_ERROR(BroadcastState(source, state_->statistics(), program_->statistics().size));
    loaded_.reset();
    return absl::OkStatus();
  }

  // A vector of the state, through host memory where that is not the device's.
  absl::Status BroadcastState(int source, float* values, int64_t size) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(size);
    if (device_->host_addressable()) return Broadcast(source, values, bytes);
    if (communicator_->on_device()) {
      if (bytes == 0) return absl::OkStatus();
      communicator_->Expect(absl::Now() + options_.collective_timeout);
      RETURN_IF_ERROR(
          communicator_
              ->EnqueueBroadcast(stream_.get(), collective::Lane::kGradients, source, values, bytes)
              .status());
      RETURN_IF_ERROR(stream_->Synchronize());
      return communicator_->Settle();
    }
    std::vector<float> host(size);
    device_->Copy(*stream_, values, host.data(), bytes);
    RETURN_IF_ERROR(stream_->Synchronize());
    RETURN_IF_ERROR(Broadcast(source, host.data(), bytes));
    device_->Copy(*stream_, host.data(), values, bytes);
    return stream_->Synchronize();
  }

  absl::Status Broadcast(int source, void* data, size_t bytes) {
    if (bytes == 0) return absl::OkStatus();
    ASSIGN_OR_RETURN(const collective::Ticket ticket,
                     communicator_->EnqueueBroadcast(nullptr, collective::Lane::kGradients, source,
                                                     data, bytes));
    return communicator_->Wait(ticket, absl::Now() + options_.collective_timeout);
  }

  absl::Status MakeLoop(const v1::CheckpointManifest& from) {
    StepLoop::Options o;
    o.rank = options_.prepare.rank();
    o.bounds = bounds_;
    for (const v1::Member& m : options_.prepare.members()) {
      o.members.emplace_back(m.bounds().begin(), m.bounds().end());
    }
    o.shards = shards_;
    o.accumulate = accumulate_;
    o.interleaved = interleaved();
    o.length = length_;
    o.evaluation = evaluation_;
    o.first_step = from.step() + 1;
    o.epoch = {from.epoch_loss_sum(), from.epoch_correct(), from.epoch_samples()};
    o.last_epoch = {from.last_epoch_loss_sum(), from.last_epoch_correct(),
                    from.last_epoch_samples()};
    if (from.has_last_evaluation()) o.last_evaluation = from.last_evaluation();
    o.has_accuracy = has_accuracy_;
    o.digest_every = spec_.train().digest_every();
    o.evaluate_every_steps = spec_.train().evaluate().every_steps();
    o.evaluate_every_epochs = spec_.train().evaluate().every_epochs();
    o.checkpoint_every_steps = spec_.checkpoint().every_steps();
    o.checkpoint_every_epochs = spec_.checkpoint().every_epochs();
    o.schedule = MakeSchedule(spec_, length_);
    o.clip_norm = spec_.optimizer().clip_norm();
    o.evaluate_only = options_.evaluate_only;
    o.flip_bit_at_step = options_.flip_bit_at_step;
    o.collective_timeout = options_.collective_timeout;

    if (o.rank == 0 && !options_.evaluate_only) {
      RETURN_IF_ERROR(MakeDirectories(JoinPath(output_dir_, "checkpoints")));
      CheckpointWriter::Options writer;
      writer.folder = JoinPath(output_dir_, "checkpoints");
      writer.keep = spec_.checkpoint().keep();
      writer.written = [this](const v1::CheckpointInfo& info) {
        v1::Progress progress;
        v1::CheckpointInfo* added = progress.add_checkpoints();
        *added = info;
        added->set_host(options_.host);
        SendProgress(std::move(progress));
      };
      writer_ = std::make_unique<CheckpointWriter>(RealFileSystem(), std::move(writer));
      Recorder::Options recorder;
      recorder.digest_path = JoinPath(output_dir_, "digests.jsonl");
      recorder.first_step = o.first_step;
      for (const auto& named : state_->named()) recorder.tensor_names.push_back(named.name);
      recorder.send = [this](v1::Progress progress) { SendProgress(std::move(progress)); };
      recorder_ = std::make_unique<Recorder>(std::move(recorder));
      RETURN_IF_ERROR(recorder_->status());
      SendProgress(v1::Progress());  // tells the run's length
    }
    RETURN_IF_ERROR(For("the batches", MakeLoaders(o.first_step)));

    StepLoop::Parts parts;
    parts.program = program_;
    parts.device = device_.get();
    parts.state = state_.get();
    parts.operations = operations_.get();
    parts.optimizer = optimizer_.get();
    parts.norm = norm_.get();
    for (const auto& plan : plans_) parts.plans.push_back(plan.get());
    parts.communicator = communicator_.get();
    parts.team = team_.get();
    parts.all_reduce = all_reduce_.get();
    parts.train = train_loader_.get();
    parts.validation = validation_loader_.get();
    parts.population = population_loader_.get();
    parts.recorder = recorder_.get();
    absl::StatusOr<std::unique_ptr<StepLoop>> loop =
        StepLoop::Make(std::move(o), std::move(parts), this);
    if (!loop.ok()) return For("the step's streams and tables", loop.status());
    loop_ = *std::move(loop);
    return absl::OkStatus();
  }

  absl::Status MakeLoaders(int64_t first_step) {
    data::BatchLoaderOptions o;
    o.shards = shards_;
    o.first_shard = bounds_.front();
    o.last_shard = bounds_.back();
    o.slots = static_cast<int>(plans_.size());
    o.depth = spec_.data().prefetch();
    o.spare_bytes = spare_bytes_;
    o.mean = mean_;
    o.std = std_;
    o.dataset = train_set_;
    o.batch = length_.batch;
    o.shuffle = true;
    o.seed = spec_.train().seed();
    o.augmentation = MakeAugmentation(spec_);
    o.first_step = first_step;
    // Batches of steps that are on the device stay.
    if (!device_->host_addressable()) {
      o.depth += RunAhead::kMost;
      o.ahead = accumulate_ == 1 && !options_.evaluate_only;
      o.last_step = length_.total_steps;
    }
    ASSIGN_OR_RETURN(train_loader_, data::BatchLoader::Make(*device_, o));
    o.depth = spec_.data().prefetch();
    o.ahead = false;
    o.shuffle = false;
    o.augmentation = {};
    o.first_step = 1;
    if (program_->has_population_norm() && !options_.evaluate_only) {
      ASSIGN_OR_RETURN(population_loader_, data::BatchLoader::Make(*device_, o));
    }
    o.dataset = validation_set_;
    o.batch = evaluation_.batch;
    ASSIGN_OR_RETURN(validation_loader_, data::BatchLoader::Make(*device_, o));
    return absl::OkStatus();
  }

  void SendProgress(v1::Progress progress) {
    progress.set_job(options_.prepare.job());
    progress.set_generation(options_.prepare.generation());
    progress.set_steps_per_epoch(length_.steps_per_epoch);
    progress.set_total_steps(length_.total_steps);
    v1::WorkerMessage message;
    *message.mutable_progress() = std::move(progress);
    options_.send(std::move(message));
  }

  void Log(const std::string& severity, const std::string& text) {
    spdlog::log(severity == "INFO"      ? spdlog::level::info
                : severity == "WARNING" ? spdlog::level::warn
                                        : spdlog::level::err,
                "job {}: {}", options_.prepare.job(), text);
    v1::WorkerMessage message;
    message.mutable_log()->set_job(options_.prepare.job());
    v1::LogLine* line = message.mutable_log()->add_lines();
    line->set_unix_ms(absl::ToUnixMillis(absl::Now()));
    line->set_worker(member_->worker());
    line->set_severity(severity);
    line->set_text(text);
    options_.send(std::move(message));
  }

  const MemberOptions options_;
  v1::JobSpec spec_;
  const v1::Member* member_ = nullptr;
  std::vector<int> bounds_;
  int shards_ = 0, accumulate_ = 1;
  int64_t probe_rows_ = 0;
  size_t spare_bytes_ = 0;  // of the device, that a copy of the data set must leave
  bool has_accuracy_ = true;
  std::string output_dir_;
  RunLength length_, evaluation_;
  std::shared_ptr<const data::Dataset> train_set_, validation_set_;
  std::vector<double> mean_, std_;  // of normalization
  std::shared_ptr<const nn::Program> program_;
  // In an order that destroys users before what they use.
  std::unique_ptr<device::Device> device_;
  std::unique_ptr<device::Stream> stream_;
  std::unique_ptr<nn::Operations> operations_;
  std::unique_ptr<optim::FlatState> state_;
  std::unique_ptr<optim::Optimizer> optimizer_;
  std::unique_ptr<optim::GradientNorm> norm_;
  std::vector<std::unique_ptr<nn::Plan>> plans_;
  std::optional<LoadedCheckpoint> loaded_;
  collective::Placement placement_;
  std::unique_ptr<collective::Rendezvous> rendezvous_;
  std::unique_ptr<collective::Communicator> communicator_;
  std::unique_ptr<collective::Team> team_;
  std::unique_ptr<collective::CanonicalAllReduce> all_reduce_;
  std::unique_ptr<data::BatchLoader> train_loader_, validation_loader_, population_loader_;
  std::unique_ptr<Recorder> recorder_;
  std::unique_ptr<CheckpointWriter> writer_;
  std::unique_ptr<StepLoop> loop_;

  absl::Mutex mutex_;
  collective::Communicator* connected_ ABSL_GUARDED_BY(mutex_) = nullptr;
  StepLoop* running_ ABSL_GUARDED_BY(mutex_) = nullptr;
  absl::Status broken_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
};

MemberJob::MemberJob(MemberOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
MemberJob::~MemberJob() = default;
absl::StatusOr<v1::Ready> MemberJob::Prepare() { return impl_->Prepare(); }
absl::StatusOr<v1::Ready> MemberJob::UseAlgorithms(const v1::Algorithms& algorithms) {
  return impl_->UseAlgorithms(algorithms);
}
v1::Ended MemberJob::Run(const v1::Start& start) { return impl_->Run(start); }
absl::Status MemberJob::broken() const { return impl_->broken(); }
void MemberJob::Stop() { impl_->Stop(); }
void MemberJob::Abort(const std::string& reason) { impl_->Abort(reason); }

}  // namespace lockstep::train
