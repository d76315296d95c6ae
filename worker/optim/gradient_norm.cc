#include "worker/optim/gradient_norm.h"

#include <algorithm>
#include <cmath>

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
  return norm;
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

double ClipScale(double norm, double clip_norm) {
  return clip_norm > 0 ? std::min(1.0, clip_norm / (norm + 1e-6)) : 1.0;
}

}  // namespace lockstep::optim
