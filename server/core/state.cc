#include "server/core/state.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace lockstep::server {
namespace {

template <typename State, typename Edges>
absl::Status Move(const Edges& edges, State* state, State to) {
  if (std::find(edges.begin(), edges.end(), Edge<State>{*state, to}) == edges.end()) {
    return absl::InternalError(
        absl::StrCat("there is no transition from ", Name(*state), " to ", Name(to)));
  }
  *state = to;
  return absl::OkStatus();
}

}  // namespace

const char* Name(WorkerState state) {
  switch (state) {
    case WorkerState::kIdle:
      return "IDLE";
    case WorkerState::kAssigned:
      return "ASSIGNED";
    case WorkerState::kTraining:
      return "TRAINING";
    case WorkerState::kLost:
      return "LOST";
  }
  return "?";
}

absl::Status Transition(v1::JobState* state, v1::JobState to) { return Move(kJobEdges, state, to); }

absl::Status Transition(WorkerState* state, WorkerState to) {
  return Move(kWorkerEdges, state, to);
}

}  // namespace lockstep::server
