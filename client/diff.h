// Comparing two runs by the digests that they recorded: <run>/digests.jsonl, one JSON object per
// line,
//   {"step":12,"state":"<32 hex>","parameters":"<32 hex>","tensors":{"conv1.weight":"<32
//   hex>",...}}
//
// Thread-safe: pure functions of the files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace lockstep::client {

struct RunDifference {
  int64_t steps_compared = 0;             // that both runs recorded, up to the first that differs
  int64_t first_step = 0, last_step = 0;  // of those
  int64_t only_a = 0, only_b = 0;         // steps that one of them alone recorded
  bool differ = false;
  int64_t step = 0;  // the first that differs; 0: none
  struct Tensor {
    std::string name, a, b;  // digests; empty: the run has no such tensor
  };
  // Those that differ at `step`, in the order of run a. Empty where the tensors' digests agree and
  // only the state's or the parameters' differ.
  std::vector<Tensor> tensors;
  std::string state_a, state_b;  // at `step`
};

// Compares folders of runs (or digests.jsonl files themselves). NotFound: a file is missing;
// InvalidArgument: a malformed line (file and line are named), or no step in common.
absl::StatusOr<RunDifference> CompareRuns(const std::string& a, const std::string& b);

nlohmann::ordered_json DifferenceJson(const RunDifference& difference);

}  // namespace lockstep::client
