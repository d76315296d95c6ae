// What a worker does for one command line, without a coordinator. Both return one JSON object in
// text.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace lockstep::train {

// The compiled program and memory plan of a spec (YAML text), for one slot that holds all shards:
//   {layers:[{name,type,inputs,output,parameters,flops,activation_bytes}], parameters, flops,
//    tensors:[{name,shape,offset,init}], memory:{parameters_bytes, gradients_bytes,
//    optimizer_bytes, activations_bytes, total_bytes}, segments, buckets}
// Of a job for GPUs the total is what a worker checks before it begins, and memory has also parts:
// [{what,bytes}], which add up to it, not_counted: [what], and at_least: whether a part is missing
// that only a GPU can say.
absl::StatusOr<std::string> ExplainSpec(const std::string& yaml);

// The newest valid checkpoint under `folder` (a run's, or a checkpoint's) scored on its validation
// set; `data_path` replaces the spec's where not empty. The numbers are those of the run's own
// evaluation.
//   {checkpoint, step, validation:{loss,accuracy,samples}, parameter_digest, state_digest}
absl::StatusOr<std::string> EvaluateCheckpoint(const std::string& folder,
                                               const std::string& data_path, int slots);

}  // namespace lockstep::train
