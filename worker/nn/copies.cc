#include "worker/nn/copies.h"

#include <algorithm>

namespace lockstep::nn {
namespace {

using device::StridedCopy;
using Shape = std::vector<int64_t>;

// With leading dimensions of 1 up to three.
Shape ThreeDimensions(const Shape& shape) {
  Shape three(3 - std::min<size_t>(3, shape.size()), 1);
  three.insert(three.end(), shape.begin(), shape.end());
  return three;
}

// Of a contiguous {h, w, c}.
void SetStrides(const Shape& shape, int64_t (&strides)[3]) {
  strides[2] = 1;
  strides[1] = shape[2];
  strides[0] = shape[1] * shape[2];
}

// All of `in`, to its own place in a tensor of `out`, which begins at to_begin.
StridedCopy Whole(const Shape& in, const Shape& out) {
  StridedCopy copy;
  std::copy(in.begin(), in.end(), copy.size);
  SetStrides(in, copy.from);
  SetStrides(out, copy.to);
  copy.from_row = spec::ElementCount(in);
  copy.to_row = spec::ElementCount(out);
  return copy;
}

StridedCopy Transposed(const spec::Layer& layer, const Shape& in, const Shape& out) {
  StridedCopy copy = Whole(out, out);
  int64_t strides[3];
  SetStrides(in, strides);
  const size_t leading = 3 - layer.order.size();
  for (size_t d = 0; d < layer.order.size(); ++d) {
    copy.from[leading + d] = strides[leading + static_cast<size_t>(layer.order[d])];
  }
  return copy;
}

}  // namespace

std::vector<StridedCopy> CopiesOf(const Program& program, int node) {
  const Program::Node& n = program.nodes()[node];
  const spec::Layer& layer = program.layer(node);
  const Shape out = ThreeDimensions(n.output);
  std::vector<StridedCopy> copies;
  switch (layer.type) {
    case spec::LayerType::kPad:
      copies.push_back(Whole(program.shape(n.inputs[0]), out));
      copies[0].to_begin = layer.padding * (copies[0].to[0] + copies[0].to[1]);
      copies[0].to_begin += layer.channels_before;
      break;
    case spec::LayerType::kConcat: {
      int64_t begin = 0;
      for (const int input : n.inputs) {
        copies.push_back(Whole(ThreeDimensions(program.shape(input)), out));
        copies.back().to_begin = begin;
        begin += program.shape(input).back();
      }
      break;
    }
    case spec::LayerType::kTranspose:
      copies.push_back(Transposed(layer, ThreeDimensions(program.shape(n.inputs[0])), out));
      break;
    default:
      break;
  }
  return copies;
}

}  // namespace lockstep::nn
