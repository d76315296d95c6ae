// Jobs, their events (state changes, step metrics, evaluations, checkpoints) and their logs, in one
// SQLite database in WAL mode under the coordinator's data folder.
//
// Store writes, and one process at a time has it: it holds a lock on the folder. StoreReader reads
// what is committed, also while the Store writes. Both are thread-compatible: one thread at a time
// each. Invariants:
//  1. A Commit is atomic; commits become visible and durable in their order.
//  2. A commit survives the death of this process; one that is `durable`, with all before it, also
//  the
//     death of the machine (synchronous = FULL).
// Errors name the file and say what to do. DataLoss: damaged. FailedPrecondition: locked, or
// written by a newer version. ResourceExhausted: the disk is full. PermissionDenied, NotFound: the
// folder.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lockstep/v1/client.pb.h"
#include "lockstep/v1/job.pb.h"
#include "server/core/events.h"
#include "server/store/database.h"

namespace lockstep::server {

class Store {
 public:
  // Makes the folder (and its parents) and the database where they are missing.
  static absl::StatusOr<std::unique_ptr<Store>> Open(const std::string& data_dir);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // All jobs in the order of submission.
  absl::StatusOr<std::vector<StoredJob>> LoadJobs();

  // All writes in one transaction, or none.
  absl::Status Commit(const std::vector<Write>& writes);

  const std::string& path() const { return database_.path(); }

 private:
  Store(int lock, Database database) : lock_(lock), database_(std::move(database)) {}

  absl::Status Insert(const Write& write);

  const int lock_;  // descriptor of the locked file
  Database database_;
  bool syncs_fully_ = true;
};

class StoreReader {
 public:
  // Of a folder that a Store was opened on.
  static absl::StatusOr<std::unique_ptr<StoreReader>> Open(const std::string& data_dir);

  // Events of job `number` after `sequence`, in order, at most `limit`.
  absl::StatusOr<std::vector<v1::JobEvent>> Events(int64_t number, int64_t sequence, int limit);
  // Steps from..to inclusive, in order, at most `limit`.
  absl::StatusOr<std::vector<v1::StepMetrics>> Steps(int64_t number, int64_t from, int64_t to,
                                                     int limit);
  absl::StatusOr<std::vector<v1::Evaluation>> Evaluations(int64_t number, int64_t from, int64_t to);
  // Lines after *cursor (0: from the first), in order, at most `limit`; moves *cursor.
  absl::StatusOr<std::vector<v1::LogLine>> Logs(int64_t number, int64_t* cursor, int limit);

 private:
  explicit StoreReader(Database database) : database_(std::move(database)) {}

  Database database_;
};

}  // namespace lockstep::server
