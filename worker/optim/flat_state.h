// The state of a model as a handful of flat vectors, and the table of named views into them.
//
//  parameters   trainable tensors, in the order in which backward finishes them (the last layer
//               first), so that gradient buckets are contiguous ranges that fill from the front
//  slots        zero to three vectors of the same layout (momentum; Adam's m and v)
//  statistics   batch norm's running averages, in layer order
//
//  rounded      the parameters as bf16, in jobs of that precision on devices that store it
//
// Everything is in logical layout; packed copies live in the device's prepared operations.
// There is one FlatState per address space: the CPU slots of a worker share one and update disjoint
// ranges, a GPU slot has its own. Not thread-safe by itself: the step loop hands out ranges.
//
// Invariants:
//  1. A tensor begins at a multiple of kAlignment elements; padding between tensors is zero and is
//     never part of a digest or a checkpoint.
//  2. The layout is a function of the graph alone.
//  3. The rounded parameters are made by what updates the parameters, the Optimizer; behind
//     everything else that writes them, by RoundParameters.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/digest.h"
#include "common/spec/graph.h"
#include "worker/device/device.h"

namespace lockstep::optim {

struct TensorView {
  std::string name;
  std::vector<int64_t> shape;
  int64_t offset = 0;  // in elements, in its vector
  int64_t size = 0;    // elements
  bool decays = false;
  spec::Initializer init;
  uint64_t digest_key = 0;  // TensorKey(name)
  double rate_multiplier = 1, decay_multiplier = 1;
};

struct FlatLayout {
  static constexpr int64_t kAlignment = 16;  // elements: one cache line
  std::vector<TensorView> tensors;           // by offset
  int64_t size = 0;                          // elements, padding included
};

// Names of the slot vectors of an optimizer, as many as device::SlotCount: {} | {"momentum"} |
// {"adam_m", "adam_v"} | {"adagrad_v"} | {"adadelta_v", "adadelta_u"} | {"rmsprop_v"}, then
// "rmsprop_m" where it is centered, then "momentum" where it has one.
std::vector<std::string> SlotNames(device::OptimizerType type);

class FlatState {
 public:
  // All zero. ResourceExhausted where the device lacks memory.
  static absl::StatusOr<std::unique_ptr<FlatState>> Make(
      device::Device& device, FlatLayout parameters, FlatLayout statistics,
      device::OptimizerType optimizer, device::Precision precision = device::Precision::kFp32);

  const FlatLayout& parameter_layout() const { return parameter_layout_; }
  const FlatLayout& statistics_layout() const { return statistics_layout_; }
  float* parameters() { return parameters_->floats(); }
  float* statistics() { return statistics_->floats(); }
  int slot_count() const { return static_cast<int>(slots_.size()); }
  float* slot(int i) { return slots_[i]->floats(); }
  // Where there is none, null, and nothing to do.
  uint16_t* rounded() {
    return rounded_ == nullptr ? nullptr : static_cast<uint16_t*>(rounded_->data());
  }
  void RoundParameters(device::Device& device, device::Stream& stream, int64_t begin, int64_t end);

  // Every tensor of the state under its checkpoint name, in digest order: parameters
  // "conv1.weight", then each slot "momentum/conv1.weight", then statistics "bn1.running_mean".
  struct Named {
    std::string name;
    const std::vector<int64_t>* shape;
    float* data;
    int64_t size;
    uint64_t digest_key;
    enum class Kind { kParameter, kSlot, kStatistic } kind;
  };
  const std::vector<Named>& named() const { return named_; }

  // Adds the digest of the part `part` of `parts` equal parts of each tensor to digests[i], one per
  // named(): slots digest disjoint parts and the sums add up to the same digest however it was cut.
  void AccumulateDigests(device::Device& device, device::Stream& stream, int part, int parts,
                         absl::Span<Digest> digests);

  // The same in one call, from a table of the pieces of a part that is made once: Enqueue, and when
  // that has run, Collect. With scalars, of the state after their step, which is kept until `ring`
  // steps later.
  class DigestTable {
   public:
    static absl::StatusOr<std::unique_ptr<DigestTable>> Make(device::Device& device,
                                                             const FlatState& state, int part,
                                                             int parts, int64_t ring = 1);
    void Enqueue(device::Device& device, device::Stream& stream,
                 const device::StepScalars* scalars = nullptr);
    void Collect(absl::Span<Digest> digests, int64_t step = 0) const;

   private:
    explicit DigestTable(int64_t ring) : ring_(ring) {}
    const int64_t ring_;
    std::vector<int> tensors_;               // by piece
    std::unique_ptr<device::Memory> table_;  // by piece
    std::unique_ptr<device::Memory> sums_;   // by place in the ring and piece, host-visible
  };

 private:
  FlatState() = default;
  FlatLayout parameter_layout_, statistics_layout_;
  std::unique_ptr<device::Memory> parameters_, statistics_;
  std::unique_ptr<device::Memory> rounded_;  // or null
  std::vector<std::unique_ptr<device::Memory>> slots_;
  std::vector<Named> named_;
};

// Fills parameters and statistics with their initial values, a pure function of (seed, tensor name,
// element index): Philox with purpose "initialize/<tensor name>", step 0. Uniform: limit * (2u -
// 1), u of 24 bits. Normal: Box & Muller 1958 in double, elements 2p and 2p + 1 from one pair of
// 32-bit words. `values` is the whole vector in host memory, the CPU's state or a staging copy;
// padding is left alone.
void Initialize(const FlatLayout& layout, uint64_t seed, float* values);
// The same for a vector in memory of the device; padding becomes zero. Waits for the stream.
absl::Status InitializeOnDevice(device::Device& device, device::Stream& stream,
                                const FlatLayout& layout, uint64_t seed, float* values);

}  // namespace lockstep::optim
