// Numbers, sizes, durations and times as people read them.
//
// Thread-safe: pure functions. Non-finite numbers are shown as "nan", "inf", "-inf".
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "lockstep/v1/job.pb.h"

namespace lockstep::client {

std::string FormatCount(int64_t n);          // 1,234,567
std::string FormatScaled(double n);          // 950, 1.25 k, 3.40 M, 1.20 G: FLOPs
std::string FormatBytes(int64_t bytes);      // 512 B, 1.5 KiB, 3.4 MiB
std::string FormatDuration(double seconds);  // 0.42 s, 12.3 s, 3m 07s, 2h 05m, 3d 04h; "-" below 0
std::string FormatLoss(double loss);         // four significant decimals: 0.3124, 12.35, 1.2e-05
std::string FormatPercent(double fraction);  // 0.92514 -> 92.51%
std::string FormatShape(const std::vector<int64_t>& shape);  // 28 x 28 x 1
// "loss 0.3124, accuracy 92.51%", without the accuracy where there is none.
std::string FormatScore(const v1::Score& score);
// Local time, to the second; "-" for 0.
std::string FormatTime(int64_t unix_ms);
// "3 s ago"
std::string FormatAge(int64_t unix_ms, absl::Time now);
// 20261124T033346Z, for names of folders.
std::string FormatStamp(absl::Time time);

// "cpu", or "cuda: NVIDIA H200, 139 GiB" (whole ones) and, where it is known, ", 12 used, 97%
// busy".
std::string FormatDevice(const v1::WorkerInfo& worker);

std::string StateName(v1::JobState state);
bool IsFinal(v1::JobState state);

// "1,2,8": ascending or not, each at least 1. InvalidArgument otherwise.
absl::StatusOr<std::vector<int>> ParseNumberList(const std::string& text);

// One line: line breaks and other control characters become spaces.
std::string OneLine(const std::string& text);

}  // namespace lockstep::client
