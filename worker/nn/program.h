// A spec's graph compiled once per job into an immutable Program: nodes with fusions chosen, the
// flat layouts, and what each node needs in forward and backward. Device-blind; shared by all
// slots.
//
// Fusions: dense or conv2d followed by a relu that is its only consumer; batch_norm followed by
// such a relu; batch_norm followed by an add of two inputs that is its only consumer, and the add's
// relu (a residual block's end, which is then computed where the add stands); the loss with the
// softmax. A fused layer's output exists under the last one's name.
//
// A Plan (plan.h) is made from it per slot and generation. Thread-safe: immutable.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/spec/graph.h"
#include "worker/device/device.h"
#include "worker/optim/flat_state.h"

namespace lockstep::nn {

// One batch norm's place in the moments record of a leaf: mean at offset, M2 at offset + channels.
struct MomentsSlice {
  int layer = 0;  // index in graph().layers
  int64_t channels = 0;
  int64_t spatial = 0;  // elements per sample and channel: count = rows * spatial
  int64_t offset = 0;   // in floats
  float momentum = 0;
  bool population = false;  // its averages are not of steps but of the whole training set
  int64_t running_mean = 0, running_var = 0;  // offsets in the statistics vector
};

class Program {
 public:
  struct Node {
    int layer = 0;        // the layer that computes
    int fused_add = -1;   // the add layer fused into a batch_norm, whose other input is inputs[1]
    int fused_relu = -1;  // the relu layer fused into it, or -1
    std::vector<int> inputs;         // nodes, or spec::kData
    std::vector<int64_t> output;     // shape per sample
    std::vector<int64_t> tensors;    // offsets of its trainable tensors in the flat parameters
    int64_t weight = -1, bias = -1;  // the first and second of them, or -1
    int moments = -1;                // index in moments(), or -1
    int64_t parameters_begin = 0, parameters_end = 0;  // its range of the flat vector with padding
    bool needs_input_gradient = true;   // false where nothing before it has parameters
    bool needs_output_gradient = true;  // it, or something before it, has parameters
    bool layerwise = false;  // trained layer by layer over all shards (Segment::layerwise)
  };

  // InvalidArgument for a graph that breaks graph.h's invariants.
  static absl::StatusOr<std::shared_ptr<const Program>> Compile(spec::Graph graph);

  const spec::Graph& graph() const { return graph_; }
  device::Precision precision() const {
    switch (graph_.precision) {
      case spec::Precision::kTf32:
        return device::Precision::kTf32;
      case spec::Precision::kBf16:
        return device::Precision::kBf16;
      default:
        return device::Precision::kFp32;
    }
  }
  const std::vector<Node>& nodes() const { return nodes_; }  // in execution order
  const optim::FlatLayout& parameters() const { return parameters_; }
  const optim::FlatLayout& statistics() const { return statistics_; }
  const std::vector<MomentsSlice>& moments() const { return moments_; }
  int64_t moments_size() const { return moments_size_; }  // floats of a leaf's record
  bool has_synchronized_norm() const { return has_synchronized_norm_; }
  bool has_population_norm() const { return has_population_norm_; }
  // How each node's output is stored, and the gradient of it, by node. Without stores_bf16
  // (Device::stores_bf16), fp32; else bf16 in that precision, where whatever makes or reads it
  // takes it so: nothing is converted between two layers, nor what a loss or a dense layer touches.
  std::vector<device::ElementType> StoredTypes(bool stores_bf16) const;
  const spec::Layer& layer(int node) const { return graph_.layers[nodes_[node].layer]; }
  // Shape per sample of a node's output, or of the data.
  const std::vector<int64_t>& shape(int node) const {
    return node == spec::kData ? graph_.data_shape : nodes_[node].output;
  }
  // Of a conv2d node, with those types.
  device::Conv2dShape Conv2dShapeOf(int node, const std::vector<device::ElementType>& stored) const;
  const std::string& node_name(int node) const;  // the name users know its output by

 private:
  Program() = default;
  spec::Graph graph_;
  std::vector<Node> nodes_;
  optim::FlatLayout parameters_, statistics_;
  std::vector<MomentsSlice> moments_;
  int64_t moments_size_ = 0;
  bool has_synchronized_norm_ = false, has_population_norm_ = false;
};

}  // namespace lockstep::nn
