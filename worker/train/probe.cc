#include "worker/train/probe.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/digest.h"
#include "common/philox.h"
#include "common/status_macros.h"
#include "worker/optim/flat_state.h"

namespace lockstep::train {
namespace {

// A batch of one shard: its gradient is the sum, its moments are the batch's.
class Alone : public nn::GradientSink, public nn::MomentExchange {
 public:
  explicit Alone(float* gradient) : gradient_(gradient) {}
  float* Leaf(int) override { return gradient_; }
  void Done(int, int64_t, int64_t) override {}
  absl::StatusOr<const float*> Combine(Kind, int64_t channels, int64_t,
                                       absl::Span<const nn::ShardInput> shards,
                                       absl::Span<const float* const> records,
                                       int64_t* rows) override {
    *rows = shards[0].rows;
    merged_.assign(records[0], records[0] + 2 * channels);
    return merged_.data();
  }

 private:
  float* gradient_;
  std::vector<float> merged_;
};

}  // namespace

absl::StatusOr<std::string> ProbeDigest(std::shared_ptr<const nn::Program> program,
                                        device::Device& device, nn::Operations& operations,
                                        int64_t rows, uint64_t seed) {
  const spec::Graph& graph = program->graph();
  ASSIGN_OR_RETURN(auto stream, device.MakeStream());
  ASSIGN_OR_RETURN(auto state,
                   optim::FlatState::Make(device, program->parameters(), program->statistics(),
                                          device::OptimizerType::kSgd, program->precision()));
  RETURN_IF_ERROR(
      optim::InitializeOnDevice(device, *stream, program->parameters(), seed, state->parameters()));
  state->RoundParameters(device, *stream, 0, program->parameters().size);
  operations.Pack(*stream, *state, 0, 1);

  const int64_t features = spec::ElementCount(graph.data_shape);
  ASSIGN_OR_RETURN(auto data, device.AllocateHostVisible(sizeof(float) * rows * features));
  ASSIGN_OR_RETURN(auto labels, device.AllocateHostVisible(sizeof(int32_t) * rows));
  const PhiloxKey key = MakePhiloxKey(0, "probe");
  // Data that an embedding reads are positions in its table.
  int64_t vocabulary = 0;
  for (const spec::Layer& layer : graph.layers) {
    if (layer.type != spec::LayerType::kEmbedding) continue;
    const int64_t table = layer.tensors[0].shape[0];
    vocabulary = vocabulary == 0 ? table : std::min(vocabulary, table);
  }
  for (int64_t i = 0; i < rows * features; ++i) {
    const uint32_t word = PhiloxAt(key, i, 0);
    data->floats()[i] =
        vocabulary > 0 ? static_cast<float>(word % vocabulary) : 2 * ToUniform(word) - 1;
  }
  auto* label = static_cast<int32_t*>(labels->data());
  for (int64_t i = 0; i < rows; ++i) {
    label[i] = static_cast<int32_t>(PhiloxAt(key, i, 1) % static_cast<uint32_t>(graph.classes));
  }
  ASSIGN_OR_RETURN(auto scalars_memory, device.AllocateHostVisible(sizeof(device::StepScalars)));
  auto* scalars = new (scalars_memory->data()) device::StepScalars();
  scalars->step = 1;

  nn::Plan::Options options;
  options.shards = {0};
  options.max_rows = rows;
  options.seed = seed;
  options.weights_beside = false;
  ASSIGN_OR_RETURN(auto plan, nn::Plan::Make(program, device, operations, options));
  ASSIGN_OR_RETURN(auto gradient, device.Allocate(sizeof(float) * program->parameters().size));
  Alone alone(gradient->floats());
  const nn::ShardInput input{0, rows, data->floats(), label, 0};
  RETURN_IF_ERROR(plan->TrainStep(*stream, *state, scalars, rows, {input}, alone, alone));
  ASSIGN_OR_RETURN(auto digest_memory, device.AllocateHostVisible(sizeof(Digest)));
  auto* digest = new (digest_memory->data()) Digest();
  device.AccumulateDigest(*stream, program->parameters().size, gradient->floats(),
                          TensorKey("probe"), 0, digest);
  RETURN_IF_ERROR(stream->Synchronize());
  return ToHex(*digest);
}

}  // namespace lockstep::train
