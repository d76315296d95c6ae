// The model of a spec as plain data: a topologically sorted list of named layers with inferred
// shapes. Both the validator (client, server) and the worker's Program compiler read it, so there
// is one shape inference. No generated headers here: worker/nn includes this file.
//
// Invariants:
//  1. layers[i].inputs refer only to layers before i, or to kData.
//  2. Shapes are per sample, NHWC without N: {h, w, c}, {features}, or of a sequence {time,
//     features}.
//  3. The last layer is the model's one output; every other layer is consumed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep::spec {

enum class LayerType {
  kDense,
  kConv2d,
  kMaxPool,
  kAveragePool,
  kGlobalAveragePool,
  kBatchNorm,
  kRelu,
  kTanh,
  kSigmoid,
  kAdd,
  kFlatten,
  kDropout,
  kPad,
  kLstm,
  kConcat,
  kMultiply,
  kLeakyRelu,
  kElu,
  kSoftplus,
  kSoftmax,
  kLayerNorm,
  kEmbedding,
  kReshape,
  kTranspose,
};
constexpr int kLayerTypes = static_cast<int>(LayerType::kTranspose) + 1;

enum class Sync { kBatch, kShard };
enum class Statistics { kRunning, kPopulation };

struct Initializer {
  enum class Type { kZeros, kOnes, kNormal, kUniform };
  // Xavier (Glorot & Bengio 2010) and He (He et al. 2015) are resolved to kNormal or kUniform with
  // their scale when the graph is built.
  Type type = Type::kZeros;
  double scale = 0;  // kNormal: standard deviation; kUniform: limit of [-limit, limit)
};

// A trainable tensor, or a batch norm's running average (trainable = false).
// Layouts: dense weight {out, in}; conv2d weight {out, kh, kw, in / groups}; lstm weight_ih {4
// hidden, in}, weight_hh {4 hidden, hidden}, biases {4 hidden}, gates in the order i f g o;
// embedding weight {vocabulary, units}; the rest {channels}.
struct TensorSpec {
  // "<layer>.weight", ".bias", ".running_mean", ".running_var"; of an lstm torch.nn.LSTM's names,
  // ".weight_ih_l0", ".weight_hh_l0", ".bias_ih_l0", ".bias_hh_l0", "..._l0_reverse", "..._l1".
  std::string name;
  std::vector<int64_t> shape;
  Initializer init;
  bool trainable = true;
  bool decays = false;  // l2 and weight_decay apply: weights of dense, conv2d and lstm
  double rate_multiplier = 1, decay_multiplier = 1;  // of the learning rate; of l2 and weight_decay
};

constexpr int kData = -1;

struct Layer {
  std::string name;
  LayerType type;
  std::vector<int> inputs;      // index of a layer, or kData
  std::vector<int64_t> output;  // shape per sample
  // In the order weight, bias, running_mean, running_var; of an lstm by layer, by direction.
  std::vector<TensorSpec> tensors;
  // Attributes of the types that have them.
  int64_t kernel = 0, stride = 1, padding = 0;
  bool bias = false;         // dense, conv2d, lstm
  double rate = 0;           // dropout; lstm: between its layers
  Sync sync = Sync::kBatch;  // batch_norm
  double momentum = 0.1, epsilon = 1e-5;
  Statistics statistics = Statistics::kRunning;     // batch_norm
  int64_t channels_before = 0, channels_after = 0;  // pad, besides padding
  int64_t hidden = 0, layers = 1;                   // lstm
  bool bidirectional = false, sequence = false;
  int64_t dilation = 1, groups = 1;  // conv2d
  double slope = 0.01;               // leaky_relu
  double alpha = 1;                  // elu
  std::vector<int64_t> order;        // transpose
  // Of a window along an axis, conv2d and pools.
  int64_t extent() const { return dilation * (kernel - 1) + 1; }
  int64_t flops = 0;  // of one sample's forward pass; a multiply-add is two
};

enum class LossType { kSoftmaxCrossEntropy, kMeanSquaredError, kSigmoidCrossEntropy };
enum class Target { kLabel, kInput };
enum class Precision { kFp32, kTf32, kBf16 };  // train.precision

struct Graph {
  std::vector<int64_t> data_shape;  // {h, w, c}
  int64_t classes = 0;
  std::vector<Layer> layers;
  LossType loss = LossType::kSoftmaxCrossEntropy;
  Target target = Target::kLabel;
  double label_smoothing = 0;  // softmax_cross_entropy
  Precision precision = Precision::kFp32;
};

// Product of the dimensions; 1 for {}. The shapes of a Graph cannot overflow it.
inline int64_t ElementCount(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t dimension : shape) count *= dimension;
  return count;
}

// The spec's name of a type, "conv2d".
inline const char* LayerTypeName(LayerType type) {
  constexpr const char* kNames[] = {
      "dense",      "conv2d",     "max_pool", "average_pool", "global_average_pool",
      "batch_norm", "relu",       "tanh",     "sigmoid",      "add",
      "flatten",    "dropout",    "pad",      "lstm",         "concat",
      "multiply",   "leaky_relu", "elu",      "softplus",     "softmax",
      "layer_norm", "embedding",  "reshape",  "transpose"};
  return kNames[static_cast<int>(type)];
}

}  // namespace lockstep::spec
