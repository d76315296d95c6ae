#include "client/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/format.h"
#include "common/fs.h"

namespace lockstep::client {
namespace {

absl::Status SystemError(const std::string& what) { return absl::ErrnoToStatus(errno, what); }

class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  ~Fd() { Close(); }
  Fd(const Fd&) = delete;
  int get() const { return fd_; }
  void Set(int fd) {
    Close();
    fd_ = fd;
  }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

// What the child does between fork and exec: async-signal-safe calls only. Reports errno through
// `report` where it fails.
[[noreturn]] void BecomeProgram(char* const* arguments, pid_t parent, int in, int out, int err,
                                int inherit, int report) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);  // it died before the line above
  for (int signal = 1; signal < NSIG; ++signal) {
    if (signal != SIGKILL && signal != SIGSTOP) ::signal(signal, SIG_DFL);
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  // All above 3 first, so that no dup2 overwrites one that is still needed.
  const int high_in = fcntl(in, F_DUPFD_CLOEXEC, 10), high_out = fcntl(out, F_DUPFD_CLOEXEC, 10);
  const int high_err = fcntl(err, F_DUPFD_CLOEXEC, 10);
  const int high_report = fcntl(report, F_DUPFD_CLOEXEC, 10);
  const int high_inherit = inherit >= 0 ? fcntl(inherit, F_DUPFD_CLOEXEC, 10) : -1;
  dup2(high_in, 0);
  dup2(high_out, 1);
  dup2(high_err, 2);
  if (high_inherit >= 0) dup2(high_inherit, kInheritedFd);
  // Also what our own parent left open in us: whoever waits for its end would wait for the child's.
  close_range(high_inherit >= 0 ? kInheritedFd + 1 : kInheritedFd, ~0u, CLOSE_RANGE_CLOEXEC);
  execv(arguments[0], arguments);
  const int error = errno;
  if (write(high_report, &error, sizeof(error)) < 0) _exit(126);
  _exit(127);
}

}  // namespace

absl::StatusOr<Child> Child::Spawn(const SpawnOptions& options) {
  const std::string& program = options.arguments[0];
  Fd null(open("/dev/null", O_RDWR | O_CLOEXEC));
  if (null.get() < 0) return SystemError("/dev/null");
  Fd log;
  if (!options.log_path.empty()) {
    log.Set(
        open(options.log_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644));
    if (log.get() < 0) return SystemError(options.log_path);
  }
  const int sink = log.get() >= 0 ? log.get() : null.get();
  const int in = options.stdin_fd >= 0 ? options.stdin_fd : null.get();
  const int out = options.stdout_fd >= 0 ? options.stdout_fd : sink;
  const int err = options.stderr_fd >= 0 ? options.stderr_fd : sink;
  std::vector<char*> arguments;
  for (const std::string& argument : options.arguments) {
    arguments.push_back(const_cast<char*>(argument.c_str()));
  }
  arguments.push_back(nullptr);
  int report[2];
  if (pipe2(report, O_CLOEXEC) != 0) return SystemError("pipe");
  Fd report_read(report[0]), report_write(report[1]);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return SystemError(absl::StrCat("starting ", program));
  if (pid == 0) {
    BecomeProgram(arguments.data(), parent, in, out, err, options.inherit_fd, report[1]);
  }
  Child child(pid, program.substr(program.rfind('/') + 1), options.log_path);
  report_write.Close();
  int error = 0;
  ssize_t got;
  do {
    got = read(report_read.get(), &error, sizeof(error));
  } while (got < 0 && errno == EINTR);
  if (got == sizeof(error)) {
    child.Kill();
    errno = error;
    return SystemError(absl::StrCat("starting ", program));
  }
  return child;
}

Child::Child(Child&& other) noexcept
    : pid_(other.pid_),
      name_(std::move(other.name_)),
      log_path_(std::move(other.log_path_)),
      wait_status_(other.wait_status_) {
  other.pid_ = -1;
}

Child::~Child() {
  if (pid_ > 0) Kill();
}

bool Child::Ended() {
  if (wait_status_.has_value()) return true;
  int status = 0;
  if (waitpid(pid_, &status, WNOHANG) != pid_) return false;
  wait_status_ = status;
  return true;
}

void Child::Signal(int signal) {
  if (!Ended()) kill(pid_, signal);
}

bool Child::WaitUntil(absl::Time deadline) {
  // Polls: portable, short, and only at the end of a run.
  for (absl::Duration pause = absl::Milliseconds(1); !Ended();
       pause = std::min(2 * pause, absl::Milliseconds(20))) {
    if (absl::Now() >= deadline) return false;
    absl::SleepFor(pause);
  }
  return true;
}

void Child::Kill() {
  if (Ended()) return;
  kill(-pid_, SIGKILL);  // its group: whatever it has started, too
  int status = 0;
  while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
  wait_status_ = status;
}

int Child::exit_code() const {
  return wait_status_.has_value() && WIFEXITED(*wait_status_) ? WEXITSTATUS(*wait_status_) : -1;
}

std::string Child::EndText() const {
  if (!wait_status_.has_value()) return "still running";
  if (WIFEXITED(*wait_status_)) return absl::StrCat("exit code ", WEXITSTATUS(*wait_status_));
  const int signal = WTERMSIG(*wait_status_);
  return absl::StrCat("killed by signal ", signal, " (", strsignal(signal), ")");
}

absl::StatusOr<Output> RunToEnd(const std::vector<std::string>& arguments, const std::string& input,
                                Interrupts& interrupts, absl::Duration timeout) {
  int fds[6];
  for (int i = 0; i < 3; ++i) {
    if (pipe2(fds + 2 * i, O_CLOEXEC) != 0) return SystemError("pipe");
  }
  Fd in_read(fds[0]), in_write(fds[1]), out_read(fds[2]), out_write(fds[3]), err_read(fds[4]),
      err_write(fds[5]);
  fcntl(in_write.get(), F_SETFL, O_NONBLOCK);
  SpawnOptions options;
  options.arguments = arguments;
  options.stdin_fd = in_read.get();
  options.stdout_fd = out_write.get();
  options.stderr_fd = err_write.get();
  absl::StatusOr<Child> child = Child::Spawn(options);
  if (!child.ok()) return child.status();
  in_read.Close();
  out_write.Close();
  err_write.Close();

  // A program that ends without reading its input must not end us.
  sigset_t pipe_signal;
  sigemptyset(&pipe_signal);
  sigaddset(&pipe_signal, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &pipe_signal, nullptr);
  const absl::Time deadline = absl::Now() + timeout;
  Output output;
  size_t written = 0;
  if (input.empty()) in_write.Close();
  while (out_read.get() >= 0 || err_read.get() >= 0) {
    pollfd polled[] = {{interrupts.fd(), POLLIN, 0},
                       {in_write.get(), POLLOUT, 0},
                       {out_read.get(), POLLIN, 0},
                       {err_read.get(), POLLIN, 0}};
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError(
          absl::StrCat(child->name(), " did not answer within ", absl::FormatDuration(timeout)));
    }
    if (poll(polled, 4,
             static_cast<int>(std::min<int64_t>(INT_MAX, left / absl::Milliseconds(1) + 1))) < 0) {
      continue;
    }
    if (polled[0].revents != 0) {
      const int signal = interrupts.Next();
      if (signal != 0 && signal != SIGCHLD) return absl::CancelledError("interrupted");
    }
    if (polled[1].revents != 0) {
      const ssize_t n = write(in_write.get(), input.data() + written, input.size() - written);
      if (n > 0) written += n;
      if ((n < 0 && errno != EAGAIN) || written == input.size()) in_write.Close();
    }
    const auto drain = [&polled](int index, Fd& fd, std::string& to) {
      if (polled[index].revents == 0) return;
      char buffer[4096];
      const ssize_t n = read(fd.get(), buffer, sizeof(buffer));
      if (n > 0) to.append(buffer, n);
      if (n == 0) fd.Close();
    };
    drain(2, out_read, output.out);
    drain(3, err_read, output.err);
  }
  if (!child->WaitUntil(deadline)) child->Kill();
  output.exit_code = child->exit_code();
  output.end = child->EndText();
  return output;
}

absl::StatusOr<std::string> ProgramPath(const std::string& name) {
  char self[PATH_MAX];
  const ssize_t n = readlink("/proc/self/exe", self, sizeof(self));
  if (n <= 0) return SystemError("/proc/self/exe");
  const std::string path = JoinPath(ParentPath(std::string(self, n)), name);
  if (access(path.c_str(), X_OK) != 0) {
    return absl::NotFoundError(
        absl::StrCat(path,
                     " is missing; install or build the programs lockstep, lockstep-server and "
                     "lockstep-worker into one folder"));
  }
  return path;
}

std::string LastLine(const std::string& text) {
  size_t end = text.size();
  while (end > 0) {
    const size_t newline = text.rfind('\n', end - 1);
    const size_t begin = newline == std::string::npos ? 0 : newline + 1;
    const std::string line = OneLine(text.substr(begin, end - begin));
    if (!line.empty()) return line;
    if (newline == std::string::npos) break;
    end = newline;
  }
  return "";
}

std::string LastLineOfFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  // The end is enough, however long a log has become.
  constexpr std::streamoff kTail = 4096;
  file.seekg(0, std::ios::end);
  const std::streamoff size = file.tellg();
  if (size <= 0) return "";
  file.seekg(std::max<std::streamoff>(0, size - kTail));
  return LastLine(std::string(std::istreambuf_iterator<char>(file), {}));
}

}  // namespace lockstep::client
