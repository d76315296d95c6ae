// The commands of `lockstep`, each as a function from its options to an exit code: kExitOk,
// kExitFailed, kExitUsage, kExitInterrupted. Results go to standard output; every error is one line
// on standard error that says what to do next.
//
// Run one on the main thread of a process that has made `interrupts` at its start.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/interrupts.h"

namespace lockstep::client {

struct RunOptions {
  std::string spec;
  int workers = 1;
  int slots = 0;  // of each worker; 0: the machine's cores, shared among the workers
  std::vector<std::string> overrides;
  std::string out;     // empty: ./runs/<job>-<UTC time>
  std::string resume;  // a run's folder or a checkpoint's
  bool json = false;
};
int Run(const RunOptions& options, Interrupts& interrupts);

struct ClusterOptions {
  std::string coordinator;
  bool insecure = false;
  bool json = false;
};
struct SubmitOptions {
  std::string spec;
  std::vector<std::string> overrides;
  std::string out, resume;
  bool follow = false;
};
int Submit(const SubmitOptions& options, const ClusterOptions& cluster, Interrupts& interrupts);
int ListJobs(const ClusterOptions& cluster, Interrupts& interrupts);
int Describe(const std::string& job, const ClusterOptions& cluster, Interrupts& interrupts);
int Watch(const std::string& job, const ClusterOptions& cluster, Interrupts& interrupts);
int Logs(const std::string& job, bool follow, const ClusterOptions& cluster,
         Interrupts& interrupts);
int Metrics(const std::string& job, bool csv, const ClusterOptions& cluster,
            Interrupts& interrupts);
int Cancel(const std::string& job, const ClusterOptions& cluster, Interrupts& interrupts);
int ListWorkers(const ClusterOptions& cluster, Interrupts& interrupts);

struct ExplainOptions {
  std::string spec;
  std::vector<std::string> overrides;
  std::string slots;  // "1,2,8"; empty: powers of two up to the shards
  bool json = false;
};
int Explain(const ExplainOptions& options, Interrupts& interrupts);

struct EvaluateOptions {
  std::string folder;
  std::string data;  // empty: the path in the checkpoint's spec
  bool json = false;
};
int Evaluate(const EvaluateOptions& options, Interrupts& interrupts);

struct DoctorOptions {
  std::string device;  // that must be usable, cpu or cuda; empty: cpu
  bool json = false;
};
int Doctor(const DoctorOptions& options, Interrupts& interrupts);

struct DiffOptions {
  std::string a, b;
  bool json = false;
};
int Diff(const DiffOptions& options);

// Shared by the commands.
void WriteAll(int fd, const std::string& text);  // whatever happens to the reader
// The command's exit code; where something of standard output could not be written (other than for
// a reader that left), says so and turns success into kExitFailed.
int CheckOutput(int code);
int Fail(
    const absl::Status& status);  // prints it; kExitUsage for InvalidArgument, else kExitFailed
void Warn(const std::string& text);
std::string AbsolutePath(const std::string& path);
std::string ShortPath(const std::string& path);  // relative to here where it lies below

}  // namespace lockstep::client
