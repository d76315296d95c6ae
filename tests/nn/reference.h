// A second opinion on Plan: interprets a Graph in double, layer by layer as the definitions read,
// with gradients by central differences. Knows nothing of programs, fusions, memory plans or
// kernels.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "common/spec/graph.h"

namespace lockstep::nn {

struct ReferenceBatch {
  std::vector<double> data;     // {samples, data shape}
  std::vector<int32_t> labels;  // {samples}
  std::vector<int64_t> rows;    // samples of each shard, in order
  bool training = true;
  uint64_t seed = 0, step = 1;  // of dropout
};

using Tensors = std::map<std::string, std::vector<double>>;

struct ReferenceResult {
  std::vector<double> shard_loss;            // sums over samples
  std::vector<int64_t> shard_correct;        // first largest output is the label
  std::vector<std::vector<double>> outputs;  // by layer, {samples, features}
  // By layer, of each group that is normalized as one: mean and biased variance by channel.
  struct Moments {
    std::vector<double> mean, variance;
  };
  std::map<int, std::vector<Moments>> moments;
};

ReferenceResult Interpret(const spec::Graph& graph, const Tensors& tensors,
                          const ReferenceBatch& batch);

// d(sum of losses / samples) / d(element) of every trainable tensor, by central differences of `h`.
Tensors DifferenceGradients(const spec::Graph& graph, const Tensors& tensors,
                            const ReferenceBatch& batch, double h = 1e-6);

}  // namespace lockstep::nn
