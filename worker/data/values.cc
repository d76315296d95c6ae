#include "worker/data/values.h"

#include <array>
#include <cmath>
#include <cstdint>

#include "absl/base/casts.h"
#include "absl/strings/str_cat.h"

namespace lockstep::data {
namespace {

constexpr double kTolerance = 1e-3;  // of bytes over 255, divided by 1/255 in float

bool Accepts(const ValueRule& rule, double value) {
  if (!std::isfinite(value)) return false;
  if (rule.whose.empty()) return true;
  const double tolerance = rule.whole ? kTolerance : 1e-6;
  return value >= rule.from - tolerance && value <= rule.to + tolerance &&
         (!rule.whole || std::abs(value - std::round(value)) <= kTolerance);
}

absl::Status Refuse(const Dataset& set, int64_t row, double stored, double normalized,
                    const ValueRule& rule) {
  std::string found = absl::StrCat(stored);
  if (normalized != stored && std::isfinite(stored)) {
    absl::StrAppend(&found, ", normalized ", normalized);
  }
  return absl::InvalidArgumentError(absl::StrCat(
      set.source(), ": row ", row, " has the value ", found, "; accepted: ",
      rule.whose.empty() ? std::string("finite numbers")
                         : absl::StrCat(rule.whole ? "whole numbers" : "numbers", " from ",
                                        rule.from, " to ", rule.to, " for ", rule.whose)));
}

}  // namespace

absl::Status CheckValues(const Dataset& set, const std::vector<double>& mean,
                         const std::vector<double>& std, const ValueRule& rule) {
  const int64_t channels = set.shape().channels, features = set.features();
  const auto normalized = [&](double value, int64_t channel) {
    const auto c = static_cast<size_t>(channel);
    return (value - mean[mean.size() == 1 ? 0 : c]) / std[std.size() == 1 ? 0 : c];
  };
  if (set.type() == SampleType::kUint8) {
    std::vector<std::array<bool, 256>> accepted(static_cast<size_t>(channels));
    bool all = true;
    for (int64_t c = 0; c < channels; ++c) {
      for (int byte = 0; byte < 256; ++byte) {
        const bool good = Accepts(rule, normalized(byte / 255.0, c));
        accepted[static_cast<size_t>(c)][static_cast<size_t>(byte)] = good;
        all = all && good;
      }
    }
    if (all) return absl::OkStatus();
    const auto* data = static_cast<const uint8_t*>(set.data());
    for (int64_t row = 0; row < set.samples(); ++row) {
      const uint8_t* sample = data + set.OffsetOf(row);
      for (int64_t i = 0; i < features; ++i) {
        if (accepted[static_cast<size_t>(i % channels)][sample[i]]) continue;
        return Refuse(set, row, sample[i], normalized(sample[i] / 255.0, i % channels), rule);
      }
    }
    return absl::OkStatus();
  }
  const auto* data = static_cast<const float*>(set.data());
  for (int64_t row = 0; row < set.samples(); ++row) {
    const float* sample = data + set.OffsetOf(row);
    if (rule.whose.empty()) {
      constexpr uint32_t kExponent = 0x7f800000;  // all ones: infinite, or not a number
      bool finite = true;
      for (int64_t i = 0; i < features; ++i) {
        finite &= (absl::bit_cast<uint32_t>(sample[i]) & kExponent) != kExponent;
      }
      if (finite) continue;
    }
    for (int64_t i = 0; i < features; ++i) {
      const double value = normalized(sample[i], i % channels);
      if (!Accepts(rule, value)) return Refuse(set, row, sample[i], value, rule);
    }
  }
  return absl::OkStatus();
}

}  // namespace lockstep::data
