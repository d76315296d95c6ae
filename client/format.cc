#include "client/format.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "fmt/format.h"

namespace lockstep::client {
namespace {

std::string Plain(double value) {
  if (std::isnan(value)) return "nan";
  return value > 0 ? "inf" : "-inf";
}

}  // namespace

std::string FormatCount(int64_t n) {
  const std::string digits = std::to_string(n);
  const size_t sign = n < 0 ? 1 : 0;
  std::string out = digits.substr(0, sign);
  for (size_t i = sign; i < digits.size(); ++i) {
    if (i > sign && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

std::string FormatScaled(double n) {
  if (!std::isfinite(n)) return Plain(n);
  const char* units[] = {"", " k", " M", " G", " T", " P", " E"};
  int unit = 0;
  while (std::abs(n) >= 999.995 && unit < 6) {
    n /= 1000;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f}", n) : fmt::format("{:.2f}{}", n, units[unit]);
}

std::string FormatBytes(int64_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  const char* units[] = {" KiB", " MiB", " GiB", " TiB", " PiB", " EiB"};
  double value = static_cast<double>(bytes) / 1024;
  int unit = 0;
  while (value >= 1023.95 && unit < 5) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.1f}{}", value, units[unit]);
}

std::string FormatDuration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "-";
  if (seconds < 9.995) return fmt::format("{:.2f} s", seconds);
  if (seconds < 59.95) return fmt::format("{:.1f} s", seconds);
  const int64_t whole = std::llround(seconds);
  if (whole < 3600) return fmt::format("{}m {:02}s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{}h {:02}m", whole / 3600, whole % 3600 / 60);
  return fmt::format("{}d {:02}h", whole / 86400, whole % 86400 / 3600);
}

std::string FormatLoss(double loss) {
  if (!std::isfinite(loss)) return Plain(loss);
  const double size = std::abs(loss);
  if (size != 0 && (size < 1e-3 || size >= 1e5)) return fmt::format("{:.3e}", loss);
  if (size < 10) return fmt::format("{:.4f}", loss);
  return fmt::format("{:.{}f}", loss, size < 100 ? 3 : size < 1000 ? 2 : 1);
}

std::string FormatPercent(double fraction) {
  if (!std::isfinite(fraction)) return Plain(fraction);
  return fmt::format("{:.2f}%", 100 * fraction);
}

std::string FormatShape(const std::vector<int64_t>& shape) {
  return shape.empty() ? "scalar" : fmt::format("{}", fmt::join(shape, " x "));
}

std::string FormatScore(const v1::Score& score) {
  std::string text = "loss " + FormatLoss(score.loss());
  if (score.has_accuracy()) text += ", accuracy " + FormatPercent(score.accuracy());
  return text;
}

std::string FormatTime(int64_t unix_ms) {
  if (unix_ms == 0) return "-";
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", absl::FromUnixMillis(unix_ms),
                          absl::LocalTimeZone());
}

std::string FormatAge(int64_t unix_ms, absl::Time now) {
  if (unix_ms == 0) return "-";
  const double seconds = absl::ToDoubleSeconds(now - absl::FromUnixMillis(unix_ms));
  if (seconds < 1) return "now";  // also where the clocks of two machines differ
  if (seconds < 60) return fmt::format("{} s ago", static_cast<int64_t>(seconds));
  return FormatDuration(seconds) + " ago";
}

std::string FormatStamp(absl::Time time) {
  return absl::FormatTime("%Y%m%dT%H%M%SZ", time, absl::UTCTimeZone());
}

std::string FormatDevice(const v1::WorkerInfo& worker) {
  if (!worker.has_gpu()) return worker.device();
  const std::string gpu = absl::StrCat(worker.device(), ": ", OneLine(worker.gpu().name()), ", ",
                                       worker.gpu().memory_bytes() >> 30, " GiB");
  if (!worker.has_gpu_usage()) return gpu;
  return absl::StrCat(gpu, ", ", worker.gpu_usage().used_bytes() >> 30, " used, ",
                      worker.gpu_usage().busy_percent(), "% busy");
}

std::string StateName(v1::JobState state) {
  return state == v1::JOB_STATE_UNSPECIFIED ? "" : v1::JobState_Name(state);
}

bool IsFinal(v1::JobState state) {
  return state == v1::SUCCEEDED || state == v1::FAILED || state == v1::CANCELLED;
}

absl::StatusOr<std::vector<int>> ParseNumberList(const std::string& text) {
  std::vector<int> numbers;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    int n = 0;
    if (!absl::SimpleAtoi(part, &n) || n < 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "'", part, "' is no number of slots; accepted: numbers from 1 up, such as 1,2,8"));
    }
    numbers.push_back(n);
  }
  return numbers;
}

std::string OneLine(const std::string& text) {
  std::string line = text;
  std::replace_if(
      line.begin(), line.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20; }, ' ');
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return line;
}

}  // namespace lockstep::client
