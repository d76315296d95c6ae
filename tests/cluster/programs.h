// The real programs as a test starts them: a coordinator, workers, and `lockstep` commands, at a
// loopback address and in a folder of the test's own.
//
// Everything that a test starts, and whatever that starts in turn, carries a mark in its
// environment: Survivors() finds what is left of it anywhere on the machine. The destructor kills
// by pid. Used by one thread.
#pragma once

#include <sys/types.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "client/interrupts.h"
#include "client/process.h"
#include "nlohmann/json.hpp"

namespace lockstep {

class Programs {
 public:
  Programs();
  ~Programs();
  Programs(const Programs&) = delete;

  const std::string& folder() const { return folder_; }
  const std::string& address() const { return address_; }  // of the coordinator

  // A job of Fashion-MNIST's first samples: an mlp with 16 hidden units, 8 shards of a batch of 64;
  // two epochs of 8 steps. `extra` is more YAML. Returns the file's path.
  std::string Spec(const std::string& name, const std::string& extra = "");
  // One that would run for hours, with a step every few milliseconds.
  std::string EndlessSpec(const std::string& name, const std::string& extra = "");

  // Waits until it serves. A coordinator that was killed comes back with its data and its address.
  void StartServer();
  void KillServer(int signal);
  // `slots` of device cpu, or what --slots takes. `arguments` are added; `environment` is
  // "NAME=value ...", passed on.
  void StartWorker(const std::string& name, int slots,
                   const std::vector<std::string>& arguments = {},
                   const std::vector<std::string>& environment = {});
  void StartWorker(const std::string& name, const std::string& slots,
                   const std::vector<std::string>& arguments = {},
                   const std::vector<std::string>& environment = {});
  client::Child& worker(const std::string& name) { return *workers_.at(name); }
  std::string WorkerLog(const std::string& name) { return JoinedPath(name + ".log"); }

  struct Result {
    int code = 0;
    std::string out, err;
    nlohmann::json json() const;  // the last line of out; discarded where it is none
  };
  // `lockstep` with these arguments and --coordinator where the command takes it.
  Result Lockstep(std::vector<std::string> arguments);
  // The same in the background: its output goes to <folder>/<log>.
  client::Child Start(const std::vector<std::string>& arguments, const std::string& log);
  // Any program to its end.
  Result Execute(const std::vector<std::string>& arguments);

  // `describe JOB -o json`; an empty object where it fails.
  nlohmann::json Job(const std::string& job);
  std::string Submit(const std::string& spec, const std::vector<std::string>& arguments = {});
  // Follows the job to its end and returns it; fails the test after a minute.
  nlohmann::json End(const std::string& job);
  void WaitForState(const std::string& job, const std::string& state);
  void WaitForStep(const std::string& job, int64_t step);
  void WaitForWorkers(int idle);

  // Processes, other than this one, that carry the mark.
  std::vector<std::string> Survivors();
  std::string JoinedPath(const std::string& name) const;

 private:
  std::string folder_, mark_, address_;
  client::Interrupts interrupts_;
  std::unique_ptr<client::Child> server_;
  std::map<std::string, std::unique_ptr<client::Child>> workers_;
};

// Asks until the answer is yes, with short pauses; false at the deadline. For what the programs
// offer no way to wait for.
bool Eventually(const std::function<bool()>& question, absl::Duration deadline = absl::Seconds(30));

// Of a text file, "" where there is none.
std::string Content(const std::string& path);

// Lines of standard error that are errors, without colors.
int ErrorLines(const std::string& err);

}  // namespace lockstep
