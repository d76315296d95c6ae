// What goes into the coordinator's core and what comes out of it, as plain values.
//
// Thread-compatible: values.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "lockstep/v1/client.pb.h"
#include "lockstep/v1/job.pb.h"
#include "lockstep/v1/worker.pb.h"

namespace lockstep::server {

using CallId = uint64_t;    // one client request; chosen by the caller, never used twice
using StreamId = uint64_t;  // one connection of a worker; chosen by the caller, never used twice
using Ticket = uint64_t;    // one Write; counts up from 1

// ---- what is stored ----

struct JobRecord {
  int64_t number = 0;  // submissions counted from 1: the order of the queue, and the end of the id
  std::string request_id;
  v1::Job job;
};

struct AlgorithmsRecord {
  int64_t job = 0;  // its number
  v1::Algorithms algorithms;
};

struct EventRecord {
  int64_t job = 0;  // its number
  v1::JobEvent event;
};

struct LogRecord {
  int64_t job = 0;
  v1::LogLine line;
};

// A job as the store gives it back.
struct StoredJob {
  JobRecord record;
  int64_t last_sequence = 0;  // of its events; 0: none
  v1::Algorithms algorithms;
};

// ---- events ----

// A spec that spec::Normalize returned.
struct Submit {
  CallId call;
  v1::SubmitJobRequest request;
};
struct Cancel {
  CallId call;
  std::string job;
};
struct StreamOpened {
  StreamId stream;
};
struct WorkerSaid {
  StreamId stream;
  v1::WorkerMessage message;
};
struct StreamLost {
  StreamId stream;
  std::string cause;
};
// The alarm that SetAlarm set.
struct AlarmFired {};
// The Writes up to this ticket are stored: they survive a crash of this process.
struct Persisted {
  Ticket ticket;
};
// The process is going to end: fail what runs, tell the workers.
struct Shutdown {};

using Event = std::variant<Submit, Cancel, StreamOpened, WorkerSaid, StreamLost, AlarmFired,
                           Persisted, Shutdown>;

// ---- actions, to be done in order ----

struct SendToWorker {
  StreamId stream;
  v1::CoordinatorMessage message;
};
struct CloseStream {
  StreamId stream;
  absl::Status status;
};
struct Reply {
  CallId call;
  absl::StatusOr<v1::Job> job;
};
// One atomic write; answered with Persisted. Writes are stored in the order of their tickets.
struct Write {
  Ticket ticket = 0;
  bool durable = false;         // must survive a crash of the machine, not only of the process
  std::vector<JobRecord> jobs;  // inserted or replaced
  std::vector<AlgorithmsRecord> algorithms;  // likewise
  std::vector<EventRecord> events;
  std::vector<LogRecord> logs;
};
// Replaces the alarm before.
struct SetAlarm {
  absl::Time at;
};

using Action = std::variant<SendToWorker, CloseStream, Reply, Write, SetAlarm>;

}  // namespace lockstep::server
