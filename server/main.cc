// lockstep-server: the coordinator.
#include <grpc/support/log.h>
#include <signal.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/rpc/address.h"
#include "server/rpc/monotonic_clock.h"
#include "server/rpc/server.h"

namespace lockstep::server {
namespace {

struct Flags {
  ServerOptions server;
  bool insecure = false;
  int ready_fd = -1;
  bool die_with_parent = false;
  std::string log_level = "info";
};

int Failed(const absl::Status& status) {
  std::fprintf(stderr, "lockstep-server: %s\n", std::string(status.message()).c_str());
  return 1;
}

// gRPC's own lines are for us, not for people.
void LogOfGrpc(gpr_log_func_args* line) { spdlog::debug("grpc: {}", line->message); }

void StartLogging(const std::string& level) {
  auto logger = spdlog::stderr_color_mt("lockstep-server");
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e %^%l%$ %v");
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(logger);
  gpr_set_log_function(&LogOfGrpc);
}

absl::Status TellReady(int fd, const std::string& address) {
  const std::string line = address + "\n";
  const bool written = write(fd, line.data(), line.size()) == static_cast<ssize_t>(line.size());
  close(fd);
  return written ? absl::OkStatus()
                 : absl::UnavailableError("cannot write the address to --ready-fd");
}

int Serve(const Flags& flags, pid_t parent) {
  if (flags.die_with_parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) return 1;  // it died before prctl
  }
  StartLogging(flags.log_level);
  const absl::StatusOr<std::string> warning =
      rpc::CheckPlaintext(flags.server.listen, flags.insecure);
  if (!warning.ok()) return Failed(warning.status());
  if (!warning->empty()) spdlog::warn("{}", *warning);

  // Every thread inherits the mask; the signals are taken by sigwait below.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  ServerOptions options = flags.server;
  absl::Status failure;  // written before the signal is sent, read after it is taken
  options.on_failure = [&failure](const absl::Status& status) {
    failure = status;
    kill(getpid(), SIGTERM);
  };
  MonotonicClock clock;
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options, clock);
  if (!server.ok()) return Failed(server.status());
  spdlog::info("lockstep-server {} serves on {}, data in {}", LOCKSTEP_VERSION,
               (*server)->address(), options.data_dir);
  if (flags.ready_fd >= 0) {
    const absl::Status told = TellReady(flags.ready_fd, (*server)->address());
    if (!told.ok()) return Failed(told);
  }

  int taken = 0;
  sigwait(&signals, &taken);
  spdlog::info("stopping");
  (*server)->Shutdown();
  return failure.ok() ? 0 : Failed(failure);
}

}  // namespace
}  // namespace lockstep::server

int main(int argc, char** argv) {
  const pid_t parent = getppid();
  lockstep::server::Flags flags;
  flags.server.data_dir = "./lockstep-data";
  CLI::App app{"The coordinator of Lockstep: queues jobs and hands their shards to workers."};
  app.set_version_flag("--version", std::string("lockstep-server ") + LOCKSTEP_VERSION);
  app.add_option("--listen", flags.server.listen,
                 "Address to serve on, HOST:PORT; port 0: the system chooses")
      ->capture_default_str();
  app.add_option("--data-dir", flags.server.data_dir,
                 "Folder of the jobs, their metrics and logs; made where it is missing")
      ->capture_default_str();
  app.add_flag("--insecure", flags.insecure,
               "Serve unencrypted on an address that other machines can reach");
  app.add_option("--ready-fd", flags.ready_fd,
                 "Write HOST:PORT and a line end to this descriptor once it serves, and close it");
  app.add_flag("--die-with-parent", flags.die_with_parent,
               "Be killed when the process that started this one ends");
  app.add_option("--log-level", flags.log_level, "What to write to standard error")
      ->check(CLI::IsMember({"debug", "info", "warning", "error", "off"}))
      ->capture_default_str();
  app.footer(
      "Example:\n"
      "  lockstep-server --listen 127.0.0.1:7070 --data-dir /var/lib/lockstep\n"
      "then, on each host:\n"
      "  lockstep-worker --coordinator 127.0.0.1:7070 --slots cpu:2");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  return lockstep::server::Serve(flags, parent);
}
