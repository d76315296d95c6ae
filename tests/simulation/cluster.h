// The simulated workers of the simulation: processes that come and go, their connections, and the
// parts they take in jobs. What a worker does is what worker.proto promises of one.
//
// Thread-compatible.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "server/core/events.h"
#include "tests/simulation/invariants.h"

namespace lockstep::server {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t Below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  bool Chance(double p) { return static_cast<double>(engine_() >> 11) * 0x1p-53 < p; }
  template <typename Container>
  auto& Pick(Container& container) {
    auto it = container.begin();
    std::advance(it, Below(static_cast<int64_t>(container.size())));
    return *it;
  }

 private:
  std::mt19937_64 engine_;
};

// One connection as both ends see it.
struct Connection {
  StreamId id = 0;
  int worker = -1;  // -1: a stranger's
  std::deque<v1::WorkerMessage> up;
  std::deque<v1::CoordinatorMessage> down;
  bool abandoned = false;  // the worker's end is gone; the coordinator learns it after `up`,
  bool silent = false;     // or never (a power cut)
  bool closed = false;     // by the coordinator
};

// A worker's part in one generation of a job.
struct Part {
  enum class Phase { kPreparing, kReady, kTraining } phase = Phase::kPreparing;
  v1::Prepare prepare;
  std::string algorithm;  // of the one problem that there is
  bool stop = false;
  bool abort = false;
  bool hangs = false;
  bool diverged = false;
};

using PartKey = std::pair<std::string, int64_t>;  // job, generation

// What the members of a generation agree on through their own exchange.
struct Team {
  int64_t step = 0;
  int64_t total = 0;
  bool stopping = false;
  std::set<int> started;  // ranks
  std::string algorithm;
};

struct SimulatedWorker {
  std::string name;
  int slots = 0;
  std::string algorithm;  // that it chooses
  uint64_t incarnation = 0;
  bool alive = false;
  bool stalled = false;  // SIGSTOP
  StreamId stream = 0;   // 0: not connected
  bool registered = false;
  absl::Time next_heartbeat;
  std::map<PartKey, Part> parts;
};

class Cluster {
 public:
  Cluster(Random& random, Invariants& invariants, std::map<std::string, int64_t>& happenings);

  std::vector<SimulatedWorker> workers;
  std::map<StreamId, Connection> connections;

  // A connection with Register under way; the caller gives the core StreamOpened.
  StreamId Connect(int worker);
  // The worker's process or its connection ends; `silent`: the coordinator is not told.
  void Disconnect(int worker, bool silent);
  void Crash(int worker, bool silent);
  void Restart(int worker);
  // All connections end with the coordinator.
  void DropAll();

  void Receive(int worker, const v1::CoordinatorMessage& message, absl::Time now);
  // One random part of the worker does its next thing. With `faults` it may go wrong.
  void Work(int worker, bool faults);
  void SendHeartbeats(absl::Time now);

 private:
  void Say(SimulatedWorker& worker, v1::WorkerMessage message);
  void Prepare(SimulatedWorker& worker, const v1::Prepare& prepare, StreamId stream);
  void WorkOn(SimulatedWorker& worker, const PartKey& key, Part& part, bool faults);
  void TakeStep(SimulatedWorker& worker, const PartKey& key, Part& part, Team& team);
  void End(SimulatedWorker& worker, const PartKey& key, v1::Ended::Outcome outcome,
           const std::string& error, bool secondary);
  static std::string Digest(const Part& part, int64_t step);

  Random& random_;
  Invariants& invariants_;
  std::map<std::string, int64_t>& happenings_;
  StreamId last_stream_ = 0;
  uint64_t last_incarnation_ = 0;
  std::map<PartKey, Team> teams_;
};

}  // namespace lockstep::server
