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
#include "worker/nn/lowering.h"
#include "worker/nn/plan.h"
#include "worker/train/checkpoint.h"
#include "worker/train/member_job.h"
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
  // The stack of partial sums that folds all leaves' gradients in order.
  const int leaves = shards * accumulate;
  const std::vector<uint8_t> present(leaves, 1);
  const int interleaved = program->has_synchronized_norm() ? accumulate : 1;
  const int64_t gradients =
      flat_bytes * collective::MakeStackSchedule(leaves, 0, leaves, present, interleaved).buffers;
  const int64_t optimizer =
      flat_bytes *
      static_cast<int64_t>(optim::SlotNames(MakeCoefficients(spec.optimizer()).type).size());
  // As a plan of all shards would have them, without making one: what is too large is what people
  // want explained.
  const int together = accumulate > 1 && !program->has_synchronized_norm() ? 1 : shards;
  const bool gpu = spec.resources().device() == "cuda";
  const int64_t activations = std::max(
      nn::PlannedActivationBytes(*program, shards, evaluation_rows, /*training=*/false, gpu),
      nn::PlannedActivationBytes(*program, together, rows, /*training=*/true, gpu));
  json["memory"] = {{"parameters_bytes", flat_bytes},
                    {"gradients_bytes", gradients},
                    {"optimizer_bytes", optimizer},
                    {"activations_bytes", activations},
                    {"total_bytes", flat_bytes + gradients + optimizer + activations}};
  json["segments"] = nn::Lower(*program, /*training=*/true).segments.size();
  json["buckets"] = collective::MakeBuckets(size, offsets, kBucketBytes).size();
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
