#include "worker/optim/gradient_norm.h"

#include <algorithm>
#include <cmath>

#include "absl/memory/memory.h"
#include "common/status_macros.h"

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
  for (const TensorView& view : layout.tensors) {
    norm->tensors_.push_back({view.offset, view.size, norm->blocks_});
    norm->blocks_ += (view.size + device::kNormBlock - 1) / device::kNormBlock;
  }
  ASSIGN_OR_RETURN(norm->sums_,
                   device.AllocateHostVisible(
                       sizeof(double) * static_cast<size_t>(std::max<int64_t>(norm->blocks_, 1))));
  return norm;
}

void GradientNorm::Sum(device::Device& device, device::Stream& stream, int part, int parts,
                       const float* gradient) {
  const int64_t begin = blocks_ * part / parts, end = blocks_ * (part + 1) / parts;
  for (const Tensor& tensor : tensors_) {
    const int64_t blocks = (tensor.size + device::kNormBlock - 1) / device::kNormBlock;
    const int64_t first = std::max(begin, tensor.first_block) - tensor.first_block;
    const int64_t last = std::min(end - tensor.first_block, blocks);
    if (first >= last) continue;
    const int64_t from = first * device::kNormBlock;
    const int64_t to = std::min(last * device::kNormBlock, tensor.size);
    device.SquaredNorms(stream, to - from, gradient + tensor.offset + from,
                        sums() + tensor.first_block + first);
  }
}

bool GradientNorm::IsFinite(int part, int parts) const {
  return std::all_of(sums() + blocks_ * part / parts, sums() + blocks_ * (part + 1) / parts,
                     [](double sum) { return std::isfinite(sum); });
}

double GradientNorm::Value() const {
  if (blocks_ == 0) return 0;
  const auto count = static_cast<int64_t>(tensors_.size());
  return std::sqrt(TreeSum(0, count, [&](int64_t i) {
    const int64_t end = i + 1 < count ? tensors_[i + 1].first_block : blocks_;
    return TreeSum(tensors_[i].first_block, end, [&](int64_t block) { return sums()[block]; });
  }));
}

double ClipScale(double norm, double clip_norm) {
  return clip_norm > 0 ? std::min(1.0, clip_norm / (norm + 1e-6)) : 1.0;
}

}  // namespace lockstep::optim
