#include "worker/data/moments.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace lockstep::data {
namespace {

constexpr int64_t kLargestFile = 16 << 20;
constexpr char kFirstLine[] = "lockstep moments 1";

ChannelMoments OfBytes(const Dataset& set) {
  const auto channels = static_cast<size_t>(set.shape().channels);
  std::vector<uint64_t> sums(channels), squares(channels);
  const auto* data = static_cast<const uint8_t*>(set.data());
  for (int64_t sample = 0; sample < set.samples(); ++sample) {
    const uint8_t* next = data + set.OffsetOf(sample);
    const uint8_t* const end = next + set.features();
    while (next < end) {
      for (size_t c = 0; c < channels; ++c) {
        const uint64_t byte = *next++;
        sums[c] += byte;
        squares[c] += byte * byte;
      }
    }
  }
  using Wide = unsigned __int128;
  const auto count = static_cast<uint64_t>(set.samples() * (set.features() / set.shape().channels));
  ChannelMoments moments;
  for (size_t c = 0; c < channels; ++c) {
    const Wide spread = Wide{count} * squares[c] - Wide{sums[c]} * sums[c];  // n^2 * variance
    const double scale = 255.0 * static_cast<double>(count);
    moments.mean.push_back(static_cast<double>(sums[c]) / scale);
    moments.std.push_back(std::sqrt(static_cast<double>(spread)) / scale);
  }
  return moments;
}

ChannelMoments OfFloats(const Dataset& set) {
  const auto channels = static_cast<size_t>(set.shape().channels);
  const int64_t pixels = set.shape().height * set.shape().width;
  std::vector<double> mean(channels), m2(channels);
  const auto* data = static_cast<const float*>(set.data());
  for (int64_t sample = 0; sample < set.samples(); ++sample) {
    const float* const values = data + set.OffsetOf(sample);
    for (size_t c = 0; c < channels; ++c) {
      double sum = 0, spread = 0;
      for (int64_t p = 0; p < pixels; ++p)
        sum += values[p * set.shape().channels + static_cast<int64_t>(c)];
      const double own = sum / static_cast<double>(pixels);
      for (int64_t p = 0; p < pixels; ++p) {
        const double off = values[p * set.shape().channels + static_cast<int64_t>(c)] - own;
        spread += off * off;
      }
      const auto before = static_cast<double>(sample * pixels);
      const double total = before + static_cast<double>(pixels), delta = own - mean[c];
      mean[c] += delta * (static_cast<double>(pixels) / total);
      m2[c] += spread + delta * delta * (before * static_cast<double>(pixels) / total);
    }
  }
  ChannelMoments moments;
  for (size_t c = 0; c < channels; ++c) {
    moments.mean.push_back(mean[c]);
    moments.std.push_back(std::sqrt(m2[c] / static_cast<double>(set.samples() * pixels)));
  }
  return moments;
}

// Hexadecimal floats: every bit comes back.
std::string ToText(const ChannelMoments& moments) {
  std::string text = absl::StrCat(kFirstLine, " ", moments.mean.size(), "\n");
  for (size_t c = 0; c < moments.mean.size(); ++c) {
    absl::StrAppendFormat(&text, "%a %a\n", moments.mean[c], moments.std[c]);
  }
  return text;
}

bool FromText(const std::string& text, int64_t channels, ChannelMoments* moments) {
  std::istringstream in(text);
  std::string line;
  if (!std::getline(in, line) || line != absl::StrCat(kFirstLine, " ", channels)) return false;
  for (int64_t c = 0; c < channels; ++c) {
    if (!std::getline(in, line)) return false;
    char* end = nullptr;
    const double mean = std::strtod(line.c_str(), &end);
    if (*end != ' ') return false;
    const double std = std::strtod(end + 1, &end);
    if (*end != '\0' || !std::isfinite(mean) || !(std > 0) || !std::isfinite(std)) return false;
    moments->mean.push_back(mean);
    moments->std.push_back(std);
  }
  moments->cached = true;
  return !std::getline(in, line);
}

}  // namespace

absl::StatusOr<ChannelMoments> ComputeMoments(FileSystem& fs, const std::string& cache_folder,
                                              const Dataset& set) {
  const std::string path =
      cache_folder.empty() ? "" : JoinPath(cache_folder, "moments-" + set.digest());
  if (!path.empty()) {
    const absl::StatusOr<std::string> text = ReadFile(fs, path, kLargestFile);
    ChannelMoments cached;
    if (text.ok() && FromText(*text, set.shape().channels, &cached)) return cached;
  }
  ChannelMoments moments = set.type() == SampleType::kUint8 ? OfBytes(set) : OfFloats(set);
  for (size_t c = 0; c < moments.std.size(); ++c) {
    if (moments.std[c] > 0 && std::isfinite(moments.std[c])) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        set.source(), ": the standard deviation of channel ", c, " is ", moments.std[c],
        "; data.normalize.compute needs finite values that vary in every channel"));
  }
  if (!path.empty() && MakeDirectories(fs, cache_folder).ok()) {
    WriteFileAtomically(fs, path, ToText(moments)).IgnoreError();
  }
  return moments;
}

std::string CacheFolder() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  if (const std::string own = variable("LOCKSTEP_CACHE"); !own.empty()) return own;
  if (const std::string xdg = variable("XDG_CACHE_HOME"); !xdg.empty()) return xdg + "/lockstep";
  if (const std::string home = variable("HOME"); !home.empty()) return home + "/.cache/lockstep";
  return "";
}

}  // namespace lockstep::data
