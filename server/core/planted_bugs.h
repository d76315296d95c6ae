// Bugs that tests/simulation plants into the coordinator's core, to show that its invariants find
// them. They exist only in the library target server_core_planted, which the simulation links; in
// every other build Planted() is the constant false.
//
// Thread-compatible: one simulation at a time.
#pragma once

namespace lockstep::server {

enum class PlantedBug {
  kNone,
  kSlotFreedAtAbort,       // a slot is free when its member is told to abort, not when it has left
  kReplyBeforePersisted,   // a submission is acknowledged before its record is durable
  kNoScheduleAfterEnd,     // slots that a job frees do not start the next job
  kQueueOvertaken,         // a small job starts before the head of the queue
  kDigestOfNeighborsOnly,  // the last member's digest is not compared
  kRestartForgetsRunning,  // a job that was RUNNING stays so after a restart
  kShardGap,               // the first shard of later members is run by nobody
  kAlgorithmsNotShared,    // members start with the algorithms that each chose
};

#ifdef LOCKSTEP_PLANTED_BUGS
inline PlantedBug planted_bug = PlantedBug::kNone;
inline bool Planted(PlantedBug bug) { return planted_bug == bug; }
#else
constexpr bool Planted(PlantedBug) { return false; }
#endif

}  // namespace lockstep::server
