// One coordinator and its workers as child processes of this one, on loopback ports that the system
// chooses: `lockstep run`'s cluster.
//
// Owns the processes: they are stopped by Stop, killed when the cluster is destroyed, and killed by
// the kernel when the thread that called Start dies in any way. Use it on the main thread only.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/interrupts.h"
#include "client/process.h"

namespace lockstep::client {

struct LocalClusterOptions {
  std::string server_program, worker_program;  // paths
  std::string folder;                          // absolute; holds server/, worker-<i>/ and logs/
  int workers = 1;
  int slots = 1;               // of each
  std::string device = "cpu";  // of the slots
};

class LocalCluster {
 public:
  // Returns when the coordinator serves and every worker has been started. Cancelled: a signal
  // asked us to end. Unavailable: a program did not start; the message has the last line of its
  // log.
  static absl::StatusOr<std::unique_ptr<LocalCluster>> Start(const LocalClusterOptions& options,
                                                             Interrupts& interrupts);
  LocalCluster(const LocalCluster&) = delete;

  const std::string& address() const { return address_; }

  // One that has ended by itself and was not returned before, described in one line.
  struct Loss {
    std::string worker;  // its name; empty: the coordinator
    std::string text;    // "worker-1 stopped (killed by signal 9 (Killed)): <last line of its log>"
  };
  std::optional<Loss> NextLoss();

  // SIGTERM to the workers, then to the coordinator; SIGKILL to whoever does not obey in time.
  void Stop();
  void Kill();  // SIGKILL to all, now

 private:
  struct Member {
    std::string name;
    Child child;
    bool reported = false;
  };

  LocalCluster() = default;
  absl::Status StartServer(const LocalClusterOptions& options, Interrupts& interrupts);

  std::string address_;
  std::vector<Member> members_;  // the coordinator, then the workers
};

}  // namespace lockstep::client
