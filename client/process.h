// Child processes that never outlive us: each gets a process group of its own (a terminal's Ctrl-C
// reaches only us, who then stop it), dies when the thread that started it dies, and is killed when
// its Child is destroyed.
//
// Invariants:
//  1. Spawn on the main thread: the kernel ties a child's life to the thread that made it.
//  2. A child starts with no blocked signal, default handlers, standard input of /dev/null (or what
//  is
//     given), and no file descriptor of ours but those named.
// Thread safety: a Child is used by one thread.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/interrupts.h"

namespace lockstep::client {

struct SpawnOptions {
  std::vector<std::string> arguments;  // [0] is the program's path
  std::string log_path;                // standard output and error; empty: /dev/null
  // Instead of log_path and /dev/null where not -1.
  int stdin_fd = -1, stdout_fd = -1, stderr_fd = -1;
  int inherit_fd = -1;  // stays open in the child, under number 3
};
constexpr int kInheritedFd = 3;

class Child {
 public:
  // NotFound, PermissionDenied: the program cannot be started; other codes: the log, or the
  // machine.
  static absl::StatusOr<Child> Spawn(const SpawnOptions& options);
  Child(Child&& other) noexcept;
  Child& operator=(Child&&) = delete;
  ~Child();  // kills and reaps

  pid_t pid() const { return pid_; }
  const std::string& name() const { return name_; }  // the program's, without its folder
  const std::string& log_path() const { return log_path_; }

  // Whether it has ended; reaps it then. Never waits.
  bool Ended();
  // Sends a signal to it while it runs.
  void Signal(int signal);
  // Waits until it ended; false at the deadline.
  bool WaitUntil(absl::Time deadline);
  void Kill();  // SIGKILL to it and all that it started, and reaps it

  // Of one that ended: "exit code 3", "killed by signal 9 (Killed)".
  std::string EndText() const;
  int exit_code() const;  // -1 where a signal ended it

 private:
  Child(pid_t pid, std::string name, std::string log_path)
      : pid_(pid), name_(std::move(name)), log_path_(std::move(log_path)) {}

  pid_t pid_ = -1;
  std::string name_, log_path_;
  std::optional<int> wait_status_;
};

struct Output {
  int exit_code = 0;  // -1 where a signal ended it
  std::string end;    // as Child::EndText
  std::string out, err;
};

// Runs a program to its end with `input` as its standard input. Cancelled: a signal of `interrupts`
// asked us to end; the program is killed. DeadlineExceeded likewise.
absl::StatusOr<Output> RunToEnd(const std::vector<std::string>& arguments, const std::string& input,
                                Interrupts& interrupts, absl::Duration timeout);

// A program of Lockstep: beside this one. NotFound: it is not there.
absl::StatusOr<std::string> ProgramPath(const std::string& name);

// The last line of a log that says something, "" for an empty or unreadable one.
std::string LastLine(const std::string& text);
std::string LastLineOfFile(const std::string& path);

}  // namespace lockstep::client
