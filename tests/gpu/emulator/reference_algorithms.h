// The reference libraries have two algorithms of one product or convolution, whose sums round
// otherwise; Options::sums says which they propose. Thread-safe.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "tests/gpu/emulator/emulator.h"
#include "worker/device/cuda/algorithm_book.h"

namespace lockstep::emulator {

constexpr char kInOrder[] = "in order", kReverse[] = "in reverse";

// What the book has for the problem, or else what is proposed, which then is there.
inline absl::StatusOr<bool> IsReverse(device::cuda::AlgorithmBook& book,
                                      const std::string& problem) {
  const Sums sums = CurrentSums();
  const std::string given =
      book.Find(problem).value_or(sums == Sums::kReversed ? kReverse : kInOrder);
  const bool reverse = given == kReverse;
  if ((!reverse && given != kInOrder) || (reverse && sums == Sums::kOnlyInOrder)) {
    return absl::FailedPreconditionError(
        absl::StrCat("this GPU cannot compute a ", problem, " by the job's algorithm, ", given));
  }
  book.Add(problem, given);
  return reverse;
}

}  // namespace lockstep::emulator
