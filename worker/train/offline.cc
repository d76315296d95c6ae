#include "worker/train/offline.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/host.h"
#include "common/spec/spec.h"
#include "common/status_macros.h"
#include "nlohmann/json.hpp"
#include "worker/collective/all_reduce.h"
#include "worker/collective/tree.h"
#include "worker/data/sampler.h"
#include "worker/device/gpu_workspace.h"
#include "worker/device/module/cuda_module.h"
#include "worker/nn/lowering.h"
#include "worker/nn/plan.h"
#include "worker/train/checkpoint.h"
#include "worker/train/member_job.h"
#include "worker/train/memory_need.h"
#include "worker/train/spec_options.h"

namespace lockstep::train {
namespace {

using Json = nlohmann::ordered_json;

std::string InitializerText(const spec::Initializer& init) {
  switch (init.type) {
    case spec::Initializer::Type::kZeros:
      return "zeros";
    case spec::Initializer::Type::kOnes:
      return "ones";
    case spec::Initializer::Type::kNormal:
      return absl::StrCat("normal(", init.scale, ")");
    case spec::Initializer::Type::kUniform:
      return absl::StrCat("uniform(", init.scale, ")");
  }
  return "";
}

absl::StatusOr<std::unique_ptr<device::Device>> FirstGpu() {
  ASSIGN_OR_RETURN(const device::CudaModule* module, device::LoadCudaModule());
  const device::CudaReport report = module->report();
  for (const device::GpuInfo& gpu : report.gpus) {
    if (gpu.cannot_use.empty()) return module->make_device(gpu.ordinal);
  }
  return absl::FailedPreconditionError(report.gpus.empty() ? report.problem
                                                           : report.gpus.front().cannot_use);
}

// By the rule that a worker refuses jobs by (memory_need.h), on one GPU that has all shards.
absl::StatusOr<Json> GpuMemory(const v1::JobSpec& spec,
                               const std::shared_ptr<const nn::Program>& program,
                               int optimizer_vectors) {
  const v1::TrainSpec& train = spec.train();
  const JobCut cut{train.batch(),      train.evaluate().batch(), train.shards(),
                   train.accumulate(), {{0, train.shards()}},    0};
  MemoryFacts facts;
  facts.program = program.get();
  // Of data sets whose size only they tell, batches are full.
  facts.samples = spec.data().train_samples() > 0 ? spec.data().train_samples() : cut.batch;
  facts.evaluation_samples = spec.data().validation_samples() > 0 ? spec.data().validation_samples()
                                                                  : cut.evaluation_batch;
  facts.optimizer_vectors = optimizer_vectors;
  facts.stream_bytes = device::kGpuWorkspaceBytes;
  Json unknown = Json::array();
  absl::StatusOr<std::unique_ptr<device::Device>> gpu = FirstGpu();
  absl::Status asked = gpu.status();
  facts.scratch = [&](const std::vector<int64_t>& rows, int most) -> absl::StatusOr<int64_t> {
    if (!asked.ok()) return 0;
    const auto operations = nn::Operations::Make(program, **gpu, rows, most);
    asked = operations.status();
    return operations.ok() ? static_cast<int64_t>((*operations)->scratch_bytes()) : 0;
  };
  ASSIGN_OR_RETURN(const MemoryNeed need, NeedOf(cut, facts, /*staged=*/false));
  if (!asked.ok()) {
    unknown.push_back(absl::StrCat("scratch of the layers, which only a GPU can say: ",
                                   absl::string_view(asked.message())));
  }
  unknown.push_back("what CUDA and its libraries take, and packed copies of weights");
  unknown.push_back("a copy of the data set, or of some batches as it has them");
  Json parts = Json::array();
  for (const MemoryNeed::Part& part : need.parts) {
    parts.push_back({{"what", part.what}, {"bytes", part.bytes}});
  }
  return Json{{"total_bytes", need.total},
              {"parts", std::move(parts)},
              {"at_least", !asked.ok()},
              {"not_counted", std::move(unknown)}};
}

}  // namespace

absl::StatusOr<std::string> ExplainSpec(const std::string& yaml) {
  ASSIGN_OR_RETURN(const v1::JobSpec spec, spec::LoadText(yaml, "standard input", {}));
  ASSIGN_OR_RETURN(spec::Graph graph, spec::BuildGraph(spec));
  ASSIGN_OR_RETURN(auto program, nn::Program::Compile(std::move(graph)));
  const int shards = spec.train().shards();
  // Without the data, short batches are unknown; full ones decide the memory.
  const int accumulate = spec.train().accumulate();
  const int64_t batch = spec.train().batch();
  const int64_t rows = data::RangeOfMicrobatch({batch, shards, accumulate}, batch, 0, 0).count;
  const int64_t evaluation_batch = spec.train().evaluate().batch();
  const int64_t evaluation_rows =
      data::RangeOfShard(evaluation_batch, shards, evaluation_batch, 0).count;

  Json json;
  int64_t parameters = 0, flops = 0;
  json["layers"] = Json::array();
  const spec::Graph& g = program->graph();
  for (const spec::Layer& layer : g.layers) {
    Json j;
    j["name"] = layer.name;
    j["type"] = spec::LayerTypeName(layer.type);
    j["inputs"] = Json::array();
    for (int input : layer.inputs)
      j["inputs"].push_back(input == spec::kData ? "data" : g.layers[input].name);
    j["output"] = layer.output;
    int64_t own = 0;
    for (const spec::TensorSpec& tensor : layer.tensors) {
      if (tensor.trainable) own += spec::ElementCount(tensor.shape);
    }
    j["parameters"] = own;
    j["flops"] = layer.flops;
    j["activation_bytes"] =
        spec::ElementCount(layer.output) * static_cast<int64_t>(sizeof(float)) * rows;
    parameters += own;
    flops += layer.flops;
    json["layers"].push_back(std::move(j));
  }
  json["parameters"] = parameters;
  json["flops"] = flops;
  json["tensors"] = Json::array();
  std::vector<int64_t> offsets;
  for (const optim::FlatLayout* layout : {&program->parameters(), &program->statistics()}) {
    for (const optim::TensorView& tensor : layout->tensors) {
      json["tensors"].push_back({{"name", tensor.name},
                                 {"shape", tensor.shape},
                                 {"offset", tensor.offset},
                                 {"init", InitializerText(tensor.init)}});
    }
  }
  for (const optim::TensorView& tensor : program->parameters().tensors)
    offsets.push_back(tensor.offset);
  const int64_t size = program->parameters().size;
  const int64_t flat_bytes = size * static_cast<int64_t>(sizeof(float));
  const bool gpu = spec.resources().device() == "cuda";
  const int leaves = shards * accumulate;
  // A GPU keeps every leaf's vector and the sum; a CPU the stack of partial sums that folds them in
  // order.
  int64_t gradients = leaves + 1;
  if (!gpu) {
    const std::vector<uint8_t> present(leaves, 1);
    const int interleaved = program->has_synchronized_norm() ? accumulate : 1;
    gradients = collective::MakeStackSchedule(leaves, 0, leaves, present, interleaved).buffers;
  }
  gradients *= flat_bytes;
  const auto optimizer_vectors =
      static_cast<int>(optim::SlotNames(MakeCoefficients(spec.optimizer()).type).size());
  const int64_t optimizer = flat_bytes * optimizer_vectors;
  // As a plan of all shards would have them, without making one: what is too large is what people
  // want explained.
  const int together = accumulate > 1 && !program->has_synchronized_norm() ? 1 : shards;
  const int64_t activations = std::max(
      nn::PlannedActivationBytes(*program, shards, evaluation_rows, /*training=*/false, gpu),
      nn::PlannedActivationBytes(*program, together, rows, /*training=*/true, gpu));
  json["memory"] = {{"parameters_bytes", flat_bytes},
                    {"gradients_bytes", gradients},
                    {"optimizer_bytes", optimizer},
                    {"activations_bytes", activations},
                    {"total_bytes", flat_bytes + gradients + optimizer + activations}};
  if (gpu) {
    ASSIGN_OR_RETURN(const Json needed, GpuMemory(spec, program, optimizer_vectors));
    json["memory"].update(needed);
  }
  json["segments"] = nn::Lower(*program, /*training=*/true, gpu, gpu).segments.size();
  json["buckets"] =
      collective::MakeBuckets(size, offsets, gpu ? kGpuBucketBytes : kBucketBytes).size();
  return json.dump();
}

absl::StatusOr<std::string> EvaluateCheckpoint(const std::string& folder,
                                               const std::string& data_path, int slots) {
  ASSIGN_OR_RETURN(const FoundCheckpoint found, FindNewestCheckpoint(RealFileSystem(), folder));
  MemberOptions options;
  options.evaluate_only = true;
  options.data_path = data_path;
  options.prepare.set_job("evaluate");
  options.prepare.set_generation(1);
  *options.prepare.mutable_spec() = found.manifest.spec();
  options.prepare.set_resume_from(found.path);
  v1::Member* member = options.prepare.add_members();
  member->set_worker("local");
  member->set_host_id("local");
  const int shards = found.manifest.spec().train().shards();
  slots = std::min(slots, shards);
  for (int i = 0; i <= slots; ++i)
    member->add_bounds(static_cast<int>(int64_t{i} * shards / slots));
  options.send = [](const v1::WorkerMessage&) {};
  MemberJob job(std::move(options));
  ASSIGN_OR_RETURN(const v1::Ready ready, job.Prepare());
  v1::Start start;
  start.add_rendezvous(ready.rendezvous());
  start.set_source_rank(0);
  const v1::Ended ended = job.Run(start);
  if (ended.outcome() != v1::Ended::COMPLETED) return absl::InternalError(ended.error());
  Json json;
  json["checkpoint"] = found.path;
  json["step"] = found.manifest.step();
  if (!found.notes.empty()) json["notes"] = found.notes;
  const v1::Score& score = ended.result().validation();
  json["validation"] = {{"loss", score.loss()}};
  if (score.has_accuracy()) json["validation"]["accuracy"] = score.accuracy();
  json["validation"]["samples"] = score.samples();
  json["parameter_digest"] = ended.result().parameter_digest();
  json["state_digest"] = ended.result().state_digest();
  return json.dump();
}

}  // namespace lockstep::train
