#include <algorithm>
#include <utility>

#include "absl/memory/memory.h"
#include "common/status_macros.h"
#include "worker/nn/lowering.h"
#include "worker/nn/lstm_tensors.h"
#include "worker/nn/plan.h"

namespace lockstep::nn {

absl::StatusOr<std::unique_ptr<Operations>> Operations::Make(std::shared_ptr<const Program> program,
                                                             device::Device& device,
                                                             absl::Span<const int64_t> rows,
                                                             int64_t most_shards) {
  const device::Precision precision = program->precision();
  auto operations = absl::WrapUnique(new Operations());
  const int nodes = static_cast<int>(program->nodes().size());
  const std::vector<device::ElementType> stored = program->StoredTypes(device.stores_bf16());
  operations->dense_.resize(nodes);
  operations->conv2d_.resize(nodes);
  operations->lstm_.resize(nodes);
  for (int i = 0; i < nodes; ++i) {
    const Program::Node& node = program->nodes()[i];
    const spec::Layer& layer = program->layer(i);
    const std::vector<int64_t>& input = program->shape(node.inputs[0]);
    const device::Activation activation =
        node.fused_relu >= 0 ? device::Activation::kRelu : device::Activation::kNone;
    if (layer.type == spec::LayerType::kDense) {
      const device::DenseShape shape{spec::ElementCount(input),
                                     node.output[0],
                                     layer.bias,
                                     activation,
                                     precision,
                                     most_shards};
      ASSIGN_OR_RETURN(operations->dense_[i], device.MakeDense(shape, rows));
      operations->scratch_bytes_ =
          std::max(operations->scratch_bytes_, operations->dense_[i]->scratch_bytes());
    } else if (layer.type == spec::LayerType::kConv2d) {
      ASSIGN_OR_RETURN(operations->conv2d_[i],
                       device.MakeConv2d(program->Conv2dShapeOf(i, stored), rows));
      operations->scratch_bytes_ =
          std::max(operations->scratch_bytes_, operations->conv2d_[i]->scratch_bytes());
    } else if (layer.type == spec::LayerType::kLstm) {
      for (int part = 0; part < layer.layers; ++part) {
        device::LstmShape shape = LstmShapeOf(*program, i, part);
        shape.most_rows = most_shards * *std::max_element(rows.begin(), rows.end());
        ASSIGN_OR_RETURN(std::unique_ptr<device::Lstm> lstm, device.MakeLstm(shape, rows));
        operations->scratch_bytes_ = std::max(operations->scratch_bytes_, lstm->scratch_bytes());
        operations->lstm_[i].push_back(std::move(lstm));
      }
    }
  }
  operations->program_ = std::move(program);
  return operations;
}

void Operations::Pack(device::Stream& stream, optim::FlatState& state, int part, int parts) {
  const float* const parameters = state.parameters();
  const uint16_t* const rounded = state.rounded();
  int operation = 0;
  for (size_t i = 0; i < dense_.size(); ++i) {
    for (size_t k = 0; k < lstm_[i].size(); ++k) {
      if (operation++ % parts != part) continue;
      const int node = static_cast<int>(i), layer = static_cast<int>(k);
      const LstmTensors<const float> tensors(*program_, node, layer, parameters);
      if (rounded == nullptr) {
        lstm_[i][k]->Pack(stream, tensors.directions(), {});
      } else {
        const LstmTensors<const uint16_t> of_bf16(*program_, node, layer, rounded);
        lstm_[i][k]->Pack(stream, tensors.directions(), of_bf16.directions());
      }
    }
    if (dense_[i] == nullptr && conv2d_[i] == nullptr) continue;
    if (operation++ % parts != part) continue;
    const int64_t at = program_->nodes()[i].weight;
    const uint16_t* const of_bf16 = rounded == nullptr ? nullptr : rounded + at;
    if (dense_[i] != nullptr) {
      dense_[i]->Pack(stream, parameters + at, of_bf16);
    } else {
      conv2d_[i]->Pack(stream, parameters + at, of_bf16);
    }
  }
}

}  // namespace lockstep::nn
