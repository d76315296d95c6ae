// What `lockstep explain` prints: the expanded graph, the memory plan, the placement, the whole
// spec.
//
// The worker itself (`lockstep-worker --explain`) compiles the graph and plans the memory, so that
// what is shown is what will run. Thread-safe: pure functions.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/terminal.h"
#include "lockstep/v1/spec.pb.h"
#include "nlohmann/json.hpp"

namespace lockstep::client {

struct SlotShards {
  int first_shard = 0, last_shard = 0;  // [first, last)
  int64_t samples = 0;                  // of a full batch
};

// Samples of one shard of a full batch: the first batch mod shards of them have one more.
int64_t ShardSamples(int64_t batch, int shards, int shard);

// Who holds which shard on `slots` slots (more than shards: the others hold none).
std::vector<SlotShards> Place(int64_t batch, int shards, int slots);

// 1, 2, 4, … and the number of shards itself.
std::vector<int> UsualSlotCounts(int shards);

// Joins what the worker said (the object of `--explain`) with the spec and the placements.
// InvalidArgument: `worker` is not such an object.
absl::StatusOr<nlohmann::ordered_json> ExplanationJson(const v1::JobSpec& spec,
                                                       const nlohmann::ordered_json& worker,
                                                       const std::vector<int>& slot_counts);

// The same for people; `json` is ExplanationJson's, `yaml` the resolved spec.
std::string ExplanationText(const nlohmann::ordered_json& json, const std::string& yaml,
                            const Terminal& terminal);

}  // namespace lockstep::client
