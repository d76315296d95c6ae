// The state machines of jobs and workers: an enum, a constexpr table of the allowed transitions,
// and one Transition().
//
// Thread-safe: pure functions.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "lockstep/v1/job.pb.h"

namespace lockstep::server {

template <typename State>
struct Edge {
  State from;
  State to;
  constexpr bool operator==(const Edge&) const = default;
};

// A job that has not ended holds slots exactly in STARTING, RUNNING and STOPPING.
constexpr std::array<Edge<v1::JobState>, 8> kJobEdges = {{
    {v1::QUEUED, v1::STARTING},     // a generation is placed
    {v1::QUEUED, v1::CANCELLED},    // nothing to stop
    {v1::STARTING, v1::RUNNING},    // every member is ready and was told to start
    {v1::STARTING, v1::STOPPING},   // cancelled, or failed to form
    {v1::RUNNING, v1::STOPPING},    // cancelled or failed
    {v1::RUNNING, v1::SUCCEEDED},   // every member completed with one digest
    {v1::STOPPING, v1::FAILED},     // every member has left, or
    {v1::STOPPING, v1::CANCELLED},  // as its target said
}};

enum class WorkerState {
  kIdle,      // connected, no job
  kAssigned,  // has slots in jobs, none of which runs
  kTraining,  // has slots in a job that runs
  kLost,      // not connected
};
constexpr int kWorkerStates = 4;

constexpr std::array<Edge<WorkerState>, 9> kWorkerEdges = {{
    {WorkerState::kIdle, WorkerState::kAssigned},
    {WorkerState::kAssigned, WorkerState::kTraining},
    {WorkerState::kAssigned, WorkerState::kIdle},
    {WorkerState::kTraining, WorkerState::kAssigned},
    {WorkerState::kTraining, WorkerState::kIdle},
    {WorkerState::kIdle, WorkerState::kLost},
    {WorkerState::kAssigned, WorkerState::kLost},
    {WorkerState::kTraining, WorkerState::kLost},
    {WorkerState::kLost, WorkerState::kIdle},  // registered again
}};

const char* Name(WorkerState state);  // "IDLE"
inline const std::string& Name(v1::JobState state) { return v1::JobState_Name(state); }

// Moves *state to `to`. Internal, naming both, and no change: the table has no such edge.
absl::Status Transition(v1::JobState* state, v1::JobState to);
absl::Status Transition(WorkerState* state, WorkerState to);

inline bool HasEnded(v1::JobState state) {
  return state == v1::SUCCEEDED || state == v1::FAILED || state == v1::CANCELLED;
}

// How often each transition fired since the process began, by [from][to].
struct TransitionCounts {
  std::array<std::array<int64_t, v1::JobState_ARRAYSIZE>, v1::JobState_ARRAYSIZE> job = {};
  std::array<std::array<int64_t, kWorkerStates>, kWorkerStates> worker = {};
  int64_t refused = 0;  // not in the table: a bug of ours
};

}  // namespace lockstep::server
