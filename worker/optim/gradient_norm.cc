#include "worker/optim/gradient_norm.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/memory/memory.h"
#include "common/status_macros.h"
#include "worker/device/upload.h"

namespace lockstep::optim {
namespace {

// The sum of value(begin) to value(end - 1) by the canonical tree.
template <class Value>
double TreeSum(int64_t begin, int64_t end, const Value& value) {
  if (end - begin == 1) return value(begin);
  int64_t half = 1;
  while (half * 2 < end - begin) half *= 2;
  const double left = TreeSum(begin, begin + half, value);
  return left + TreeSum(begin + half, end, value);
}

// The tree of Value as groups, level by level: over each tensor's blocks, whose numbers `counts`
// are, then over the tensors.
class Levels {
 public:
  explicit Levels(std::vector<int32_t> counts) {
    const auto tensors = static_cast<int32_t>(counts.size());
    while (std::any_of(counts.begin(), counts.end(), [](int32_t n) { return n > 1; })) Add(counts);
    counts = {tensors};
    while (counts.front() > 1) Add(counts);
  }
  const std::vector<device::SumGroup>& groups() const { return groups_; }
  const std::vector<int32_t>& level_groups() const { return level_groups_; }

 private:
  // `counts`: how many values each tree still has.
  void Add(std::vector<int32_t>& counts) {
    const size_t before = groups_.size();
    int32_t begin = 0;
    for (int32_t& count : counts) {
      for (int32_t at = 0; at < count; at += device::kSumGroup) {
        groups_.push_back({begin + at, std::min(device::kSumGroup, count - at)});
      }
      begin += count;
      count = (count + device::kSumGroup - 1) / device::kSumGroup;
    }
    level_groups_.push_back(static_cast<int32_t>(groups_.size() - before));
  }

  std::vector<device::SumGroup> groups_;
  std::vector<int32_t> level_groups_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GradientNorm>> GradientNorm::Make(device::Device& device,
                                                                 const FlatLayout& layout) {
  auto norm = absl::WrapUnique(new GradientNorm());
  std::vector<device::NormBlock> blocks;
  for (const TensorView& view : layout.tensors) {
    norm->first_blocks_.push_back(static_cast<int64_t>(blocks.size()));
    for (int64_t at = 0; at < view.size; at += device::kNormBlock) {
      blocks.push_back({view.offset + at, std::min(device::kNormBlock, view.size - at)});
    }
  }
  norm->blocks_ = static_cast<int64_t>(blocks.size());
  ASSIGN_OR_RETURN(norm->table_, device::Upload(device, blocks));
  ASSIGN_OR_RETURN(norm->sums_,
                   device.AllocateHostVisible(
                       sizeof(double) * static_cast<size_t>(std::max<int64_t>(norm->blocks_, 1))));
  if (device.host_addressable() || blocks.empty()) return norm;
  std::vector<int32_t> counts;
  for (size_t i = 0; i < norm->first_blocks_.size(); ++i) {
    const bool last = i + 1 == norm->first_blocks_.size();
    counts.push_back(static_cast<int32_t>((last ? norm->blocks_ : norm->first_blocks_[i + 1]) -
                                          norm->first_blocks_[i]));
  }
  Levels levels(std::move(counts));
  if (levels.level_groups().size() > device::StepGate::kMostLevels) {
    return absl::InternalError("a gradient of more tensors than a gate takes");
  }
  norm->level_groups_ = levels.level_groups();
  ASSIGN_OR_RETURN(norm->groups_, device::Upload(device, levels.groups()));
  ASSIGN_OR_RETURN(norm->device_sums_,
                   device.Allocate(sizeof(double) * static_cast<size_t>(norm->blocks_)));
  return norm;
}

void GradientNorm::Describe(device::StepGate* gate) const {
  if (blocks_ == 0) return;
  gate->block_count = blocks_;
  gate->blocks = static_cast<const device::NormBlock*>(table_->data());
  gate->squares = static_cast<double*>(device_sums_->data());
  gate->groups = static_cast<const device::SumGroup*>(groups_->data());
  gate->levels = static_cast<int>(level_groups_.size());
  std::copy(level_groups_.begin(), level_groups_.end(), gate->level_groups);
}

void GradientNorm::Sum(device::Device& device, device::Stream& stream, int part, int parts,
                       const float* gradient) {
  const int64_t begin = blocks_ * part / parts, end = blocks_ * (part + 1) / parts;
  device.SquaredNormsOf(stream, end - begin,
                        static_cast<const device::NormBlock*>(table_->data()) + begin, gradient,
                        sums() + begin);
}

bool GradientNorm::IsFinite(int part, int parts) const {
  return std::all_of(sums() + blocks_ * part / parts, sums() + blocks_ * (part + 1) / parts,
                     [](double sum) { return std::isfinite(sum); });
}

double GradientNorm::Value() const {
  if (blocks_ == 0) return 0;
  const auto count = static_cast<int64_t>(first_blocks_.size());
  return std::sqrt(TreeSum(0, count, [&](int64_t i) {
    const int64_t end = i + 1 < count ? first_blocks_[i + 1] : blocks_;
    return TreeSum(first_blocks_[i], end, [&](int64_t block) { return sums()[block]; });
  }));
}

}  // namespace lockstep::optim
