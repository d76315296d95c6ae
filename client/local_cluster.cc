#include "client/local_cluster.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/fs.h"
#include "common/status_macros.h"

namespace lockstep::client {
namespace {

constexpr absl::Duration kStartTimeout = absl::Seconds(20);
constexpr absl::Duration kStopTimeout = absl::Seconds(3);
constexpr char kServerName[] = "the coordinator";

std::string EndOf(const std::string& name, const Child& child) {
  // A program's last words, and the loader's about it, have its name before a colon; a line of the
  // log says nothing about the end.
  std::string line = LastLineOfFile(child.log_path());
  if (!absl::StrContains(line, "lockstep-server: ") &&
      !absl::StrContains(line, "lockstep-worker: ")) {
    line.clear();
  }
  return absl::StrCat(name, " stopped (", child.EndText(), ")", line.empty() ? "" : ": ", line,
                      "; log: ", child.log_path());
}

}  // namespace

absl::StatusOr<std::unique_ptr<LocalCluster>> LocalCluster::Start(
    const LocalClusterOptions& options, Interrupts& interrupts) {
  RETURN_IF_ERROR(MakeDirectories(JoinPath(options.folder, "logs")));
  std::unique_ptr<LocalCluster> cluster(new LocalCluster());
  RETURN_IF_ERROR(cluster->StartServer(options, interrupts));
  for (int i = 0; i < options.workers; ++i) {
    const std::string name = absl::StrCat("worker-", i);
    SpawnOptions spawn;
    spawn.arguments = {options.worker_program,
                       "--coordinator",
                       cluster->address_,
                       "--slots",
                       absl::StrCat(options.device, ":", options.slots),
                       "--name",
                       name,
                       "--work-dir",
                       JoinPath(options.folder, name),
                       "--die-with-parent"};
    // One worker has all GPUs; several share them.
    if (options.workers > 1) {
      spawn.arguments.insert(spawn.arguments.end(), {"--gpu", absl::StrCat(i), "--gpu-in-turn"});
    }
    spawn.log_path = JoinPath(options.folder, absl::StrCat("logs/", name, ".log"));
    ASSIGN_OR_RETURN(Child child, Child::Spawn(spawn));
    cluster->members_.push_back({name, std::move(child)});
  }
  return cluster;
}

absl::Status LocalCluster::StartServer(const LocalClusterOptions& options, Interrupts& interrupts) {
  int ready[2];
  if (pipe2(ready, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "pipe");
  SpawnOptions spawn;
  spawn.arguments = {options.server_program,
                     "--listen",
                     "127.0.0.1:0",
                     "--data-dir",
                     JoinPath(options.folder, "server"),
                     "--ready-fd",
                     absl::StrCat(kInheritedFd),
                     "--die-with-parent"};
  spawn.log_path = JoinPath(options.folder, "logs/server.log");
  spawn.inherit_fd = ready[1];
  absl::StatusOr<Child> child = Child::Spawn(spawn);
  close(ready[1]);
  if (!child.ok()) {
    close(ready[0]);
    return child.status();
  }
  members_.push_back({kServerName, *std::move(child)});
  Child& server = members_[0].child;

  // It says where it serves, or closes the pipe by ending.
  const absl::Time deadline = absl::Now() + kStartTimeout;
  absl::Status status;
  std::string line;
  while (line.find('\n') == std::string::npos) {
    if (absl::Now() > deadline) {
      status = absl::UnavailableError(absl::StrCat(kServerName, " did not start within ",
                                                   absl::FormatDuration(kStartTimeout),
                                                   "; log: ", server.log_path()));
      break;
    }
    pollfd polled[] = {{ready[0], POLLIN, 0}, {interrupts.fd(), POLLIN, 0}};
    if (poll(polled, 2, 100) <= 0) continue;
    if (polled[1].revents != 0) {
      const int signal = interrupts.Next();
      if (signal != 0 && signal != SIGCHLD) {
        status = absl::CancelledError("interrupted");
        break;
      }
    }
    if (polled[0].revents == 0) continue;
    char buffer[256];
    const ssize_t n = read(ready[0], buffer, sizeof(buffer));
    if (n > 0) line.append(buffer, n);
    if (n == 0) {
      server.WaitUntil(absl::Now() + absl::Seconds(1));
      status = absl::UnavailableError(EndOf(kServerName, server));
      break;
    }
  }
  close(ready[0]);
  RETURN_IF_ERROR(status);
  address_ = line.substr(0, line.find('\n'));
  return absl::OkStatus();
}

std::optional<LocalCluster::Loss> LocalCluster::NextLoss() {
  for (Member& member : members_) {
    if (member.reported || !member.child.Ended()) continue;
    member.reported = true;
    const bool server = &member == &members_[0];
    return Loss{server ? "" : member.name, EndOf(member.name, member.child)};
  }
  return std::nullopt;
}

void LocalCluster::Stop() {
  // Workers first, so that none finds its coordinator gone.
  for (const bool server : {false, true}) {
    std::vector<Child*> children;
    for (Member& member : members_) {
      member.reported = true;
      if ((&member == &members_[0]) == server) children.push_back(&member.child);
    }
    for (Child* child : children) child->Signal(SIGTERM);
    const absl::Time deadline = absl::Now() + kStopTimeout;
    for (Child* child : children) {
      if (!child->WaitUntil(deadline)) child->Kill();
    }
  }
}

void LocalCluster::Kill() {
  for (Member& member : members_) {
    member.reported = true;
    member.child.Signal(SIGKILL);
  }
  for (Member& member : members_) member.child.Kill();
}

}  // namespace lockstep::client
