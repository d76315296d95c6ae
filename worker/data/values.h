// What a model asks of its samples' values: found out when a job starts, naming file and row,
// rather than as a loss that is not finite.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/data/dataset.h"

namespace lockstep::data {

// Of the normalized values, (value - mean) / std; of bytes, value is byte / 255.
struct ValueRule {
  double from = 0, to = 0;
  bool whole = false;  // whole numbers, within a thousandth
  std::string whose;   // "embedding e", for the message; empty: only finite values are asked for
};

// `mean` and `std`: one for all channels, or of each. InvalidArgument: names the first row whose
// values break the rule. Reads floats once, bytes only where some of them would break the rule.
absl::Status CheckValues(const Dataset& set, const std::vector<double>& mean,
                         const std::vector<double>& std, const ValueRule& rule);

}  // namespace lockstep::data
