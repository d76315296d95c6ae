#include "worker/optim/flat_state.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/memory/memory.h"
#include "common/philox.h"
#include "common/status_macros.h"
#include "worker/device/upload.h"

namespace lockstep::optim {
namespace {

template <class T>
absl::StatusOr<std::unique_ptr<device::Memory>> AllocateVector(device::Device& device,
                                                               int64_t size) {
  // A model without parameters or statistics still has (empty) vectors with an address.
  return device.Allocate(sizeof(T) * static_cast<size_t>(size > 0 ? size : FlatLayout::kAlignment));
}

// Elements 2p and 2p + 1 of a standard normal stream.
std::pair<double, double> NormalPair(uint32_t a, uint32_t b) {
  const double radius = std::sqrt(-2.0 * std::log((a + 1.0) * 0x1p-32));
  const double angle = 2.0 * M_PI * 0x1p-32 * b;
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

}  // namespace

std::vector<std::string> SlotNames(device::OptimizerType type) {
  switch (type) {
    case device::OptimizerType::kSgd:
      return {};
    case device::OptimizerType::kMomentum:
    case device::OptimizerType::kNesterov:
      return {"momentum"};
    case device::OptimizerType::kAdam:
      return {"adam_m", "adam_v"};
    case device::OptimizerType::kAdagrad:
      return {"adagrad_v"};
    case device::OptimizerType::kAdadelta:
      return {"adadelta_v", "adadelta_u"};
    case device::OptimizerType::kRmsProp:
      return {"rmsprop_v"};
    case device::OptimizerType::kRmsPropMomentum:
      return {"rmsprop_v", "momentum"};
    case device::OptimizerType::kRmsPropCentered:
      return {"rmsprop_v", "rmsprop_m"};
    case device::OptimizerType::kRmsPropCenteredMomentum:
      return {"rmsprop_v", "rmsprop_m", "momentum"};
  }
  return {};
}

absl::StatusOr<std::unique_ptr<FlatState>> FlatState::Make(device::Device& device,
                                                           FlatLayout parameters,
                                                           FlatLayout statistics,
                                                           device::OptimizerType optimizer,
                                                           device::Precision precision) {
  auto state = absl::WrapUnique(new FlatState());
  state->parameter_layout_ = std::move(parameters);
  state->statistics_layout_ = std::move(statistics);
  const int64_t size = state->parameter_layout_.size;
  ASSIGN_OR_RETURN(state->parameters_, AllocateVector<float>(device, size));
  ASSIGN_OR_RETURN(state->statistics_,
                   AllocateVector<float>(device, state->statistics_layout_.size));
  if (precision == device::Precision::kBf16 && device.stores_bf16()) {
    ASSIGN_OR_RETURN(state->rounded_, AllocateVector<uint16_t>(device, size));
  }
  const std::vector<std::string> slot_names = SlotNames(optimizer);
  for (size_t i = 0; i < slot_names.size(); ++i) {
    ASSIGN_OR_RETURN(std::unique_ptr<device::Memory> slot, AllocateVector<float>(device, size));
    state->slots_.push_back(std::move(slot));
  }

  auto add = [&](const FlatLayout& layout, const std::string& prefix, float* base,
                 Named::Kind kind) {
    for (const TensorView& view : layout.tensors) {
      const std::string name = prefix + view.name;
      state->named_.push_back(
          {name, &view.shape, base + view.offset, view.size, TensorKey(name), kind});
    }
  };
  add(state->parameter_layout_, "", state->parameters(), Named::Kind::kParameter);
  for (size_t i = 0; i < slot_names.size(); ++i) {
    add(state->parameter_layout_, slot_names[i] + "/", state->slot(static_cast<int>(i)),
        Named::Kind::kSlot);
  }
  add(state->statistics_layout_, "", state->statistics(), Named::Kind::kStatistic);
  return state;
}

void FlatState::RoundParameters(device::Device& device, device::Stream& stream, int64_t begin,
                                int64_t end) {
  if (rounded_ == nullptr) return;
  device.RoundToBf16(stream, end - begin, parameters() + begin, rounded() + begin);
}

void FlatState::AccumulateDigests(device::Device& device, device::Stream& stream, int part,
                                  int parts, absl::Span<Digest> digests) {
  for (size_t i = 0; i < named_.size(); ++i) {
    const Named& tensor = named_[i];
    const int64_t begin = tensor.size * part / parts;
    const int64_t end = tensor.size * (part + 1) / parts;
    if (begin == end) continue;
    device.AccumulateDigest(stream, end - begin, tensor.data + begin, tensor.digest_key,
                            static_cast<uint64_t>(begin), &digests[i]);
  }
}

absl::StatusOr<std::unique_ptr<FlatState::DigestTable>> FlatState::DigestTable::Make(
    device::Device& device, const FlatState& state, int part, int parts, int64_t ring) {
  auto table = absl::WrapUnique(new DigestTable(ring));
  std::vector<device::DigestPiece> pieces;
  for (size_t i = 0; i < state.named_.size(); ++i) {
    const Named& tensor = state.named_[i];
    const int64_t end = tensor.size * (part + 1) / parts;
    for (int64_t at = tensor.size * part / parts; at < end; at += device::kDigestPiece) {
      pieces.push_back({tensor.data + at, std::min(device::kDigestPiece, end - at),
                        tensor.digest_key, static_cast<uint64_t>(at)});
      table->tensors_.push_back(static_cast<int>(i));
    }
  }
  ASSIGN_OR_RETURN(table->table_, device::Upload(device, pieces));
  ASSIGN_OR_RETURN(table->sums_,
                   device.AllocateHostVisible(sizeof(Digest) * static_cast<size_t>(ring) *
                                              std::max<size_t>(pieces.size(), 1)));
  return table;
}

void FlatState::DigestTable::Enqueue(device::Device& device, device::Stream& stream,
                                     const device::StepScalars* scalars) {
  device.DigestPieces(stream, static_cast<int64_t>(tensors_.size()),
                      static_cast<const device::DigestPiece*>(table_->data()),
                      static_cast<Digest*>(sums_->data()), scalars, ring_);
}

void FlatState::DigestTable::Collect(absl::Span<Digest> digests, int64_t step) const {
  const auto* sums = static_cast<const Digest*>(sums_->data()) +
                     static_cast<size_t>(step % ring_) * tensors_.size();
  std::fill(digests.begin(), digests.end(), Digest());
  for (size_t i = 0; i < tensors_.size(); ++i) digests[tensors_[i]] += sums[i];
}

void Initialize(const FlatLayout& layout, uint64_t seed, float* values) {
  for (const TensorView& view : layout.tensors) {
    float* out = values + view.offset;
    const PhiloxKey key = MakePhiloxKey(seed, "initialize/" + view.name);
    for (int64_t first = 0; first < view.size; first += 4) {
      double block[4] = {0, 0, 0, 0};
      switch (view.init.type) {
        case spec::Initializer::Type::kZeros:
          break;
        case spec::Initializer::Type::kOnes:
          for (double& x : block) x = 1;
          break;
        case spec::Initializer::Type::kUniform: {
          const PhiloxBlock bits = Philox(key, static_cast<uint64_t>(first / 4), 0);
          for (int i = 0; i < 4; ++i)
            block[i] = view.init.scale * (2.0 * ToUniform(bits.x[i]) - 1.0);
          break;
        }
        case spec::Initializer::Type::kNormal: {
          const PhiloxBlock bits = Philox(key, static_cast<uint64_t>(first / 4), 0);
          for (int i = 0; i < 4; i += 2) {
            const auto [even, odd] = NormalPair(bits.x[i], bits.x[i + 1]);
            block[i] = view.init.scale * even;
            block[i + 1] = view.init.scale * odd;
          }
          break;
        }
      }
      for (int64_t i = first; i < view.size && i < first + 4; ++i) {
        out[i] = static_cast<float>(block[i - first]);
      }
    }
  }
}

absl::Status InitializeOnDevice(device::Device& device, device::Stream& stream,
                                const FlatLayout& layout, uint64_t seed, float* values) {
  std::vector<float> host(static_cast<size_t>(layout.size), 0.0f);
  Initialize(layout, seed, host.data());
  device.Copy(stream, host.data(), values, sizeof(float) * host.size());
  return stream.Synchronize();
}

}  // namespace lockstep::optim
