// A Program lowered to a list of kernel calls on values (each written once, by one call), before
// memory is assigned. Internal to worker/nn. Pure; thread-safe.
//
// Invariants:
//  1. A value is written by exactly one call (a concat by consecutive ones, a part each), before
//     every call that reads it; but the last call that reads an lstm's reserve uses it up.
//  2. Contributions to a gradient are added in the order in which backward reaches its consumers
//  (the
//     last consumer first), whatever the plan. A batch_norm adds the last one in its own pass.
//  3. A view (flatten, reshape; dropout at inference) has no call: its value is its input's.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/nn/program.h"

namespace lockstep::nn {

constexpr int kNoValue = -2;
constexpr int kDataValue = -1;  // the shard's input

enum class CallType {
  // dense or conv2d: out = layer(a); out = dL/dx from a = dy; leaf gradients from a = x, b = dy
  kLinearForward,
  kLinearBackwardInput,
  kLinearBackwardWeight,
  kMaxPoolForward,   // out, out2 = argmax
  kMaxPoolBackward,  // a = dy, b = argmax
  kAveragePoolForward,
  kAveragePoolBackward,
  kGlobalAveragePoolForward,
  kGlobalAveragePoolBackward,
  kBatchNormMoments,  // of a, into the shard's moments record
  kBatchNormForward,
  kBatchNormInference,
  kBatchNormBackwardSums,  // a = x, b = y with a fused relu, c = dy; into the shard's sums and its
                           // leaf
  kBatchNormBackward,      // a, b, c the same
  kBatchNormAddForward,    // b = residual; out2 = where y is above 0, where backward reads that
  kBatchNormAddInference,
  kBatchNormGradient,  // as kBatchNormBackwardSums, d = more of dy or none; out = the gradient
                       // behind the relu, of which the sums are; b may be where y is above 0
  // a copied by Executor's table for the node and the part; out is zeroed before where parts do not
  // fill it
  kCopyForward,
  kCopyBackward,
  kReluForward,
  kReluBackward,  // a = y, b = dy; so for tanh and sigmoid
  kTanhForward,
  kTanhBackward,
  kSigmoidForward,
  kSigmoidBackward,
  kLeakyReluForward,
  kLeakyReluBackward,  // a = y, b = dy; so for elu and softmax
  kEluForward,
  kEluBackward,
  kSoftplusForward,
  kSoftplusBackward,  // a = x, b = dy
  kSoftmaxForward,
  kSoftmaxBackward,
  kLayerNormForward,         // out2 = statistics of the vectors
  kLayerNormBackwardWeight,  // a = x, b = those statistics, c = dy; into the leaf
  kLayerNormBackward,        // a, b, c the same
  kEmbeddingForward,         // a = positions
  kEmbeddingBackward,        // a = positions, b = dy; into the leaf
  kAdd,                      // out = a + b
  kMultiply,                 // out = a * b
  kDropout,                  // forward, and backward of a = dy
  // One layer of an lstm, `part`; between two of them their dropout, `part` the one before it.
  kLstmForward,          // out = y of a = x, out2 = reserve
  kLstmBackward,         // a = x, b = dy, c = reserve, out = dL/dx or none; leaf gradients
  kLstmDropout,          // as kDropout
  kSoftmaxCrossEntropy,  // a = logits, out = dL/dlogits or none
  kOneHot,
  kMeanSquaredError,     // a = y, b = target, out = dL/dy or none
  kSigmoidCrossEntropy,  // the same
  kCountCorrect,
};

// True where out may lie where an input does.
bool IsElementwise(CallType type);

struct Call {
  CallType type;
  int node;  // that it belongs to
  int a = kNoValue, b = kNoValue, c = kNoValue;
  int out = kNoValue, out2 = kNoValue;
  int d = kNoValue;
  int part = 0;  // of copies: the number of the input; of an lstm: the layer
  // Of a norm, forward: it makes the moments, too; backward: the sums. They are the leaf's own.
  bool whole = false;
  // Of a norm's sums: the call behind reads them.
  bool goes_on = false;
  // Of a norm's gradient: b is not y.
  bool above = false;
  // Of a dense's forward or backward of its input: the call behind is a whole norm that alone reads
  // what this one makes, or with backward. Of the latter of a convolution: it is a norm's gradient
  // with b where y is above 0, and d what this one makes. A device may make both at once: what this
  // one reads stays until then.
  bool then_norm = false;
};

enum class Exchange { kNone, kMoments, kSums };

// Calls [begin, end), run for all shards; then an exchange of the records of moments()[moments].
struct Segment {
  int begin = 0, end = 0;
  Exchange exchange = Exchange::kNone;
  int moments = -1;
  bool layerwise =
      false;  // a call for all shards before the next, instead of a shard after another
};

struct Lowering {
  std::vector<int64_t> value_bytes;              // per sample
  std::vector<device::ElementType> value_types;  // of what is not bytes
  std::vector<Call> calls;
  int forward_calls = 0;          // the calls of the loss begin here
  std::vector<Segment> segments;  // partition calls
  // The gradient of a dense's or conv2d's weights may be computed beside the calls behind it, up to
  // the next such gradient or the last call.
  bool weights_beside = false;
};

// One layer of an lstm node.
device::LstmShape LstmShapeOf(const Program& program, int node, int part);

// Forward, loss and backward of a training step; or forward and loss at inference. `layerwise`: all
// of it, else where it pays on a CPU. `stores_bf16`: of Program::StoredTypes.
Lowering Lower(const Program& program, bool training, bool layerwise = false,
               bool stores_bf16 = false);

}  // namespace lockstep::nn
