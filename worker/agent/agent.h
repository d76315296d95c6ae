// The agent: a worker's side of the stream to the coordinator. It registers, sends heartbeats, and
// obeys generations: each Prepare becomes a Job with a thread of its own, which sends Ready (again
// after UseAlgorithms), waits for Start and sends Ended. A lost stream abandons all jobs (their
// generations are dead) and the agent reconnects with back-off under the same incarnation.
//
// Knows nothing of training: jobs come from the factory that main.cc gives it.
// Thread safety: Run on one thread; Shutdown and Leave from any; Outbox from any.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lockstep/v1/worker.pb.h"

namespace lockstep::agent {

// Messages to the coordinator, in order; what is sent while there is no connection is dropped,
// since its generation died with the connection.
class Outbox {
 public:
  virtual ~Outbox() = default;
  virtual void Send(v1::WorkerMessage message) = 0;
};

// This worker's part in one generation of one job.
class Job {
 public:
  virtual ~Job() = default;
  // Loads what the job needs. An error ends the job.
  virtual absl::StatusOr<v1::Ready> Prepare() = 0;
  // Between Prepare and Run: makes ready again, to compute by these algorithms.
  virtual absl::StatusOr<v1::Ready> UseAlgorithms(const v1::Algorithms& algorithms) = 0;
  // Takes part until the end. After it returns and the Job is destroyed nothing of it is left.
  virtual v1::Ended Run(const v1::Start& start) = 0;
  // From any thread, at any time after construction.
  virtual void Stop() = 0;
  virtual void Abort(const std::string& reason) = 0;
  // Asked after its end: OK, or why this process can serve no job any more. Then its Ended is the
  // last that is said, and Agent::Run returns that.
  virtual absl::Status broken() const { return absl::OkStatus(); }
};

using JobFactory = std::function<std::unique_ptr<Job>(const v1::Prepare&, Outbox&)>;

struct AgentOptions {
  std::string coordinator;  // host:port
  bool insecure = false;
  std::string name;
  std::string host;
  std::string host_id;
  std::string advertise;  // IP address for peers; empty: the local address of the connection
  std::string device = "cpu";
  std::optional<v1::Gpu> gpu;  // that the slots are of
  // What its driver tells; asked for heartbeats. Null: nothing.
  std::function<std::optional<v1::GpuUsage>()> gpu_usage;
  int slots = 1;
  std::string version;
};

class Agent {
 public:
  Agent(AgentOptions options, JobFactory factory);
  ~Agent();
  Agent(const Agent&) = delete;

  // Serves until Shutdown (OK). FailedPrecondition: refused for good by the coordinator (the name
  // is taken, the registration makes no sense); InvalidArgument: the address; Aborted: what a job,
  // or Leave, says of this process, which should begin anew.
  absl::Status Run();
  void Shutdown();
  // Says, as the last that is said, that this process ends and why, so that the jobs here fail with
  // that reason. Returns when the coordinator has heard it, or after a moment's patience.
  void Leave(const absl::Status& why);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::agent
