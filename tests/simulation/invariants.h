// What must hold of the coordinator's core after every event, written without its code: from what
// it shows, what it did, what the simulated workers were told, and what the simulated disk holds.
//
// Thread-compatible. The first violation is kept as one line.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/core/core.h"

namespace lockstep::server {

// What a crash of the coordinator leaves.
struct Disk {
  std::map<int64_t, JobRecord> jobs;
  std::map<int64_t, int64_t> last_sequences;
  std::map<int64_t, v1::Algorithms> algorithms;

  std::vector<StoredJob> Load() const;
};

class Invariants {
 public:
  Invariants(const CoreOptions& options, const Disk& disk) : options_(options), disk_(disk) {}

  const std::string& violation() const { return violation_; }
  void Violate(const std::string& what);

  // What the core does.
  void OnRestart();
  void OnWrite(const Write& write);
  void OnPrepare(const v1::Prepare& prepare, StreamId stream);
  void OnSubmitted(const v1::Job& job, const std::string& request_id);
  void OnCancelled(const v1::Job& job);

  // What the members of a running job have told it.
  void OnDigest(const std::string& job, int64_t step, const std::string& digest);
  void OnEnded(const std::string& job, int rank, const v1::Ended& ended);
  void OnCancelAsked(const std::string& job) { cancel_asked_.insert(job); }

  // After every event.
  void Check(const Core& core, absl::Time now);

 private:
  struct Told {
    std::map<int64_t, std::set<std::string>> digests;  // by step
    std::map<int, v1::Ended> ended;                    // by rank
  };
  struct Since {
    v1::JobState state = v1::JOB_STATE_UNSPECIFIED;
    bool prepared = false;
    absl::Time time;
  };

  void CheckSlots(const Core& core);
  void CheckQueue(const Core& core);
  void CheckJob(const Core& core, const JobEntry& entry, absl::Time now);
  void CheckPlacement(const v1::Job& job);
  void CheckSuccess(const v1::Job& job);
  void CheckAcknowledged(const Core& core);

  const CoreOptions options_;
  const Disk& disk_;
  std::string violation_;
  std::map<int64_t, int64_t> sequences_;                       // of written events, by job
  std::map<std::string, std::set<int64_t>> prepared_;          // generations, by job
  std::map<std::string, std::set<StreamId>> prepare_streams_;  // of the newest generation
  std::map<std::string, std::string> submitted_;               // acknowledged: job -> request id
  std::set<std::string> cancelled_;                            // acknowledged
  std::set<std::string> cancel_asked_;
  std::map<std::string, Told> told_;
  std::map<int64_t, Since> since_;
  std::map<int64_t, v1::JobState> ended_on_disk_;
  std::map<int64_t, v1::JobState> ended_in_memory_;
};

}  // namespace lockstep::server
