#include "tests/nn/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/philox.h"

namespace lockstep::nn {
namespace {

using spec::ElementCount;
using spec::Layer;
using spec::LayerType;
using Values = std::vector<double>;

class Interpreter {
 public:
  Interpreter(const spec::Graph& graph, const Tensors& tensors, const ReferenceBatch& batch)
      : graph_(graph), tensors_(tensors), batch_(batch) {
    for (const int64_t rows : batch.rows) samples_ += rows;
  }

  ReferenceResult Run() {
    for (size_t i = 0; i < graph_.layers.size(); ++i) {
      result_.outputs.push_back(RunLayer(static_cast<int>(i)));
    }
    RunLoss();
    return std::move(result_);
  }

 private:
  const Values& ValuesOf(int layer) const {
    return layer == spec::kData ? batch_.data : result_.outputs[layer];
  }
  const std::vector<int64_t>& ShapeOf(int layer) const {
    return layer == spec::kData ? graph_.data_shape : graph_.layers[layer].output;
  }
  const Values& Tensor(const Layer& layer, const std::string& suffix) const {
    return tensors_.at(layer.name + suffix);
  }

  Values RunLayer(int index) {
    const Layer& layer = graph_.layers[index];
    const Values& x = ValuesOf(layer.inputs[0]);
    const std::vector<int64_t>& in = ShapeOf(layer.inputs[0]);
    Values y(samples_ * ElementCount(layer.output));
    switch (layer.type) {
      case LayerType::kDense:
        Dense(layer, ElementCount(in), x, &y);
        break;
      case LayerType::kConv2d:
        Conv2d(layer, in, x, &y);
        break;
      case LayerType::kMaxPool:
      case LayerType::kAveragePool:
        Pool(layer, in, x, &y);
        break;
      case LayerType::kGlobalAveragePool: {
        const int64_t spatial = in[0] * in[1], channels = in[2];
        for (int64_t r = 0; r < samples_; ++r) {
          for (int64_t s = 0; s < spatial; ++s) {
            for (int64_t c = 0; c < channels; ++c) {
              y[r * channels + c] += x[(r * spatial + s) * channels + c] / double(spatial);
            }
          }
        }
        break;
      }
      case LayerType::kBatchNorm:
        BatchNorm(index, x, &y);
        break;
      case LayerType::kRelu:
        for (size_t i = 0; i < x.size(); ++i) y[i] = std::max(0.0, x[i]);
        break;
      case LayerType::kTanh:
        for (size_t i = 0; i < x.size(); ++i) y[i] = std::tanh(x[i]);
        break;
      case LayerType::kSigmoid:
        for (size_t i = 0; i < x.size(); ++i) y[i] = 1 / (1 + std::exp(-x[i]));
        break;
      case LayerType::kAdd:
        for (const int input : layer.inputs) {
          for (size_t i = 0; i < y.size(); ++i) y[i] += ValuesOf(input)[i];
        }
        break;
      case LayerType::kMultiply:
        std::fill(y.begin(), y.end(), 1.0);
        for (const int input : layer.inputs) {
          for (size_t i = 0; i < y.size(); ++i) y[i] *= ValuesOf(input)[i];
        }
        break;
      case LayerType::kConcat:
        Concat(layer, &y);
        break;
      case LayerType::kLeakyRelu:
        for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] < 0 ? layer.slope * x[i] : x[i];
        break;
      case LayerType::kElu:
        for (size_t i = 0; i < x.size(); ++i)
          y[i] = x[i] < 0 ? layer.alpha * std::expm1(x[i]) : x[i];
        break;
      case LayerType::kSoftplus:
        for (size_t i = 0; i < x.size(); ++i) y[i] = std::log1p(std::exp(x[i]));
        break;
      case LayerType::kSoftmax:
      case LayerType::kLayerNorm:
        for (size_t i = 0; i < x.size(); i += in.back()) Feature(layer, &x[i], in.back(), &y[i]);
        break;
      case LayerType::kEmbedding: {
        const Values& table = Tensor(layer, ".weight");
        const int64_t features = layer.output.back();
        for (size_t i = 0; i < x.size(); ++i) {
          const auto row = static_cast<int64_t>(std::lround(x[i]));
          std::copy_n(&table.at(row * features), features, &y[i * features]);
        }
        break;
      }
      case LayerType::kTranspose:
        Transpose(layer, in, x, &y);
        break;
      case LayerType::kFlatten:
      case LayerType::kReshape:
        y = x;
        break;
      case LayerType::kPad:
        Pad(layer, in, x, &y);
        break;
      case LayerType::kDropout: {
        const PhiloxKey key = MakePhiloxKey(batch_.seed, "dropout/" + layer.name);
        const auto rate = static_cast<float>(layer.rate);
        for (size_t i = 0; i < x.size(); ++i) {
          const bool kept = !batch_.training || ToUniform(PhiloxAt(key, i, batch_.step)) >= rate;
          y[i] = !batch_.training ? x[i] : kept ? x[i] / (1 - layer.rate) : 0;
        }
        break;
      }
      case LayerType::kLstm:
        y = Lstm(layer, in, x);
        break;
    }
    return y;
  }

  // Unit by unit, as PyTorch's documentation of torch.nn.LSTM writes it down.
  Values Lstm(const Layer& layer, const std::vector<int64_t>& in, Values x) const {
    const int64_t steps = in[0], hidden = layer.hidden, directions = layer.bidirectional ? 2 : 1;
    const int64_t out = directions * hidden;
    int64_t features = ElementCount(in) / steps;
    auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
    for (int64_t k = 0; k < layer.layers; ++k) {
      Values y(samples_ * steps * out), last(samples_ * out);
      for (int64_t d = 0; d < directions; ++d) {
        const std::string tail = "_l" + std::to_string(k) + (d == 0 ? "" : "_reverse");
        const Values &wi = Tensor(layer, ".weight_ih" + tail),
                     &wh = Tensor(layer, ".weight_hh" + tail);
        for (int64_t r = 0; r < samples_; ++r) {
          Values h(hidden), c(hidden);
          for (int64_t step = 0; step < steps; ++step) {
            const int64_t t = d == 0 ? step : steps - 1 - step;
            Values gates(4 * hidden);
            for (int64_t g = 0; g < 4 * hidden; ++g) {
              if (layer.bias) {
                gates[g] =
                    Tensor(layer, ".bias_ih" + tail)[g] + Tensor(layer, ".bias_hh" + tail)[g];
              }
              for (int64_t i = 0; i < features; ++i) {
                gates[g] += wi[g * features + i] * x[(r * steps + t) * features + i];
              }
              for (int64_t i = 0; i < hidden; ++i) gates[g] += wh[g * hidden + i] * h[i];
            }
            for (int64_t u = 0; u < hidden; ++u) {
              c[u] = sigmoid(gates[hidden + u]) * c[u] +
                     sigmoid(gates[u]) * std::tanh(gates[2 * hidden + u]);
              h[u] = sigmoid(gates[3 * hidden + u]) * std::tanh(c[u]);
              y[(r * steps + t) * out + d * hidden + u] = h[u];
            }
          }
          std::copy(h.begin(), h.end(), last.begin() + r * out + d * hidden);
        }
      }
      if (k + 1 == layer.layers) return layer.sequence ? y : last;
      const PhiloxKey key =
          MakePhiloxKey(batch_.seed, "dropout/" + layer.name + ".l" + std::to_string(k));
      for (size_t i = 0; i < y.size() && batch_.training && layer.rate > 0; ++i) {
        const bool kept =
            ToUniform(PhiloxAt(key, i, batch_.step)) >= static_cast<float>(layer.rate);
        y[i] = kept ? y[i] / (1 - layer.rate) : 0;
      }
      x = y;
      features = out;
    }
    return x;
  }

  void Dense(const Layer& layer, int64_t in, const Values& x, Values* y) const {
    const int64_t out = layer.output[0];
    const Values& w = Tensor(layer, ".weight");
    for (int64_t r = 0; r < samples_; ++r) {
      for (int64_t o = 0; o < out; ++o) {
        double sum = layer.bias ? Tensor(layer, ".bias")[o] : 0;
        for (int64_t i = 0; i < in; ++i) sum += w[o * in + i] * x[r * in + i];
        (*y)[r * out + o] = sum;
      }
    }
  }

  // Calls visit(sample, out y, out x, place in window, in y, in x) for places inside the image.
  template <typename Visit>
  void EachPlace(const Layer& layer, const std::vector<int64_t>& in, const Visit& visit) const {
    for (int64_t r = 0; r < samples_; ++r) {
      for (int64_t oy = 0; oy < layer.output[0]; ++oy) {
        for (int64_t ox = 0; ox < layer.output[1]; ++ox) {
          for (int64_t k = 0; k < layer.kernel * layer.kernel; ++k) {
            const int64_t iy =
                oy * layer.stride - layer.padding + k / layer.kernel * layer.dilation;
            const int64_t ix =
                ox * layer.stride - layer.padding + k % layer.kernel * layer.dilation;
            if (iy >= 0 && iy < in[0] && ix >= 0 && ix < in[1]) visit(r, oy, ox, k, iy, ix);
          }
        }
      }
    }
  }

  void Conv2d(const Layer& layer, const std::vector<int64_t>& in, const Values& x,
              Values* y) const {
    const int64_t filters = layer.output[2], channels = in[2], window = layer.kernel * layer.kernel;
    const Values& w = Tensor(layer, ".weight");
    if (layer.bias) {
      for (size_t i = 0; i < y->size(); ++i) (*y)[i] = Tensor(layer, ".bias")[i % filters];
    }
    EachPlace(layer, in, [&](int64_t r, int64_t oy, int64_t ox, int64_t k, int64_t iy, int64_t ix) {
      const int64_t to = ((r * layer.output[0] + oy) * layer.output[1] + ox) * filters;
      const int64_t from = ((r * in[0] + iy) * in[1] + ix) * channels;
      const int64_t part = channels / layer.groups;
      for (int64_t f = 0; f < filters; ++f) {
        const int64_t first = f / (filters / layer.groups) * part;
        for (int64_t c = 0; c < part; ++c) {
          (*y)[to + f] += w[(f * window + k) * part + c] * x[from + first + c];
        }
      }
    });
  }

  void Concat(const Layer& layer, Values* y) const {
    const int64_t width = layer.output.back();
    int64_t begin = 0;
    for (const int input : layer.inputs) {
      const int64_t part = ShapeOf(input).back();
      for (size_t i = 0; i < ValuesOf(input).size(); ++i) {
        const auto at = static_cast<int64_t>(i);
        (*y)[at / part * width + begin + at % part] = ValuesOf(input)[i];
      }
      begin += part;
    }
  }

  // Softmax or layer norm of one vector.
  void Feature(const Layer& layer, const double* x, int64_t n, double* y) const {
    double mean = 0, variance = 0, sum = 0;
    for (int64_t i = 0; i < n; ++i) mean += x[i] / double(n), sum += std::exp(x[i]);
    for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean) / double(n);
    for (int64_t i = 0; i < n; ++i) {
      y[i] =
          layer.type == LayerType::kSoftmax
              ? std::exp(x[i]) / sum
              : (x[i] - mean) / std::sqrt(variance + layer.epsilon) * Tensor(layer, ".weight")[i] +
                    Tensor(layer, ".bias")[i];
    }
  }

  // Walks the output with an index for each dimension.
  void Transpose(const Layer& layer, const std::vector<int64_t>& in, const Values& x,
                 Values* y) const {
    const size_t rank = in.size();
    for (size_t i = 0; i < y->size(); ++i) {
      int64_t rest = static_cast<int64_t>(i);
      std::vector<int64_t> at(rank);
      for (size_t d = rank; d-- > 0; rest /= layer.output[d])
        at[layer.order[d]] = rest % layer.output[d];
      int64_t from = rest;  // the sample
      for (size_t d = 0; d < rank; ++d) from = from * in[d] + at[d];
      (*y)[i] = x[from];
    }
  }

  void Pad(const Layer& layer, const std::vector<int64_t>& in, const Values& x, Values* y) const {
    const int64_t width = layer.output[1], channels = layer.output[2];
    for (int64_t r = 0; r < samples_; ++r) {
      for (int64_t i = 0; i < in[0] * in[1] * in[2]; ++i) {
        const int64_t h = i / in[2] / in[1] + layer.padding, w = i / in[2] % in[1] + layer.padding;
        const int64_t c = i % in[2] + layer.channels_before;
        (*y)[r * ElementCount(layer.output) + (h * width + w) * channels + c] =
            x[r * ElementCount(in) + i];
      }
    }
  }

  void Pool(const Layer& layer, const std::vector<int64_t>& in, const Values& x, Values* y) const {
    const bool max = layer.type == LayerType::kMaxPool;
    const int64_t channels = in[2], window = layer.kernel * layer.kernel;
    if (max) std::fill(y->begin(), y->end(), -std::numeric_limits<double>::infinity());
    EachPlace(layer, in, [&](int64_t r, int64_t oy, int64_t ox, int64_t, int64_t iy, int64_t ix) {
      const int64_t to = ((r * layer.output[0] + oy) * layer.output[1] + ox) * channels;
      const int64_t from = ((r * in[0] + iy) * in[1] + ix) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        double& out = (*y)[to + c];
        out = max ? std::max(out, x[from + c]) : out + x[from + c] / double(window);
      }
    });
  }

  void BatchNorm(int index, const Values& x, Values* y) {
    const Layer& layer = graph_.layers[index];
    const int64_t channels = layer.output.back();
    const int64_t per_sample = ElementCount(layer.output) / channels;
    const Values &weight = Tensor(layer, ".weight"), &bias = Tensor(layer, ".bias");
    auto normalize = [&](int64_t begin, int64_t end, const Values& mean, const Values& variance) {
      for (int64_t i = begin * per_sample; i < end * per_sample; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          const double xhat =
              (x[i * channels + c] - mean[c]) / std::sqrt(variance[c] + layer.epsilon);
          (*y)[i * channels + c] = xhat * weight[c] + bias[c];
        }
      }
    };
    if (!batch_.training) {
      return normalize(0, samples_, Tensor(layer, ".running_mean"), Tensor(layer, ".running_var"));
    }
    std::vector<int64_t> groups = batch_.rows;
    if (layer.sync == spec::Sync::kBatch) groups = {samples_};
    int64_t begin = 0;
    for (const int64_t rows : groups) {
      const int64_t end = begin + rows, n = rows * per_sample;
      Values mean(channels), variance(channels);
      for (int64_t i = begin * per_sample; i < end * per_sample; ++i) {
        for (int64_t c = 0; c < channels; ++c) mean[c] += x[i * channels + c] / double(n);
      }
      for (int64_t i = begin * per_sample; i < end * per_sample; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          const double d = x[i * channels + c] - mean[c];
          variance[c] += d * d / double(n);
        }
      }
      normalize(begin, end, mean, variance);
      result_.moments[index].push_back({mean, variance});
      begin = end;
    }
  }

  void RunLoss() {
    const Values& y = result_.outputs.back();
    const int64_t features = ElementCount(graph_.layers.back().output);
    const bool labels = graph_.loss == spec::LossType::kSoftmaxCrossEntropy ||
                        graph_.target == spec::Target::kLabel;
    int64_t r = 0;
    for (const int64_t rows : batch_.rows) {
      double loss = 0;
      int64_t correct = 0;
      for (const int64_t end = r + rows; r < end; ++r) {
        const double* row = &y[r * features];
        const double* largest = std::max_element(row, row + features);
        if (labels) correct += largest - row == batch_.labels[r];
        if (graph_.loss == spec::LossType::kSoftmaxCrossEntropy) {
          double sum = 0;
          for (int64_t i = 0; i < features; ++i) sum += std::exp(row[i] - *largest);
          for (int64_t i = 0; i < features; ++i) {
            const double target = (1 - graph_.label_smoothing) * double(i == batch_.labels[r]) +
                                  graph_.label_smoothing / double(features);
            loss += target * (std::log(sum) + *largest - row[i]);
          }
          continue;
        }
        for (int64_t i = 0; i < features; ++i) {
          const double target =
              labels ? double(i == batch_.labels[r]) : batch_.data[r * features + i];
          loss += (graph_.loss == spec::LossType::kSigmoidCrossEntropy
                       ? std::log1p(std::exp(row[i])) - row[i] * target
                       : (row[i] - target) * (row[i] - target)) /
                  double(features);
        }
      }
      result_.shard_loss.push_back(loss);
      result_.shard_correct.push_back(correct);
    }
  }

  const spec::Graph& graph_;
  const Tensors& tensors_;
  const ReferenceBatch& batch_;
  int64_t samples_ = 0;
  ReferenceResult result_;
};

double MeanLoss(const spec::Graph& graph, const Tensors& tensors, const ReferenceBatch& batch) {
  double sum = 0, samples = 0;
  for (const double loss : Interpret(graph, tensors, batch).shard_loss) sum += loss;
  for (const int64_t rows : batch.rows) samples += double(rows);
  return sum / samples;
}

}  // namespace

ReferenceResult Interpret(const spec::Graph& graph, const Tensors& tensors,
                          const ReferenceBatch& batch) {
  return Interpreter(graph, tensors, batch).Run();
}

Tensors DifferenceGradients(const spec::Graph& graph, const Tensors& tensors,
                            const ReferenceBatch& batch, double h) {
  Tensors gradients, moved = tensors;
  for (const Layer& layer : graph.layers) {
    for (const spec::TensorSpec& tensor : layer.tensors) {
      if (!tensor.trainable) continue;
      Values& values = moved[tensor.name];
      Values& gradient = gradients[tensor.name];
      for (double& value : values) {
        const double kept = value;
        value = kept + h;
        const double above = MeanLoss(graph, moved, batch);
        value = kept - h;
        const double below = MeanLoss(graph, moved, batch);
        value = kept;
        gradient.push_back((above - below) / (2 * h));
      }
    }
  }
  return gradients;
}

}  // namespace lockstep::nn
