// Scenarios on processes: the test binary starts itself once for each member and plays the
// coordinator, which passes everybody's rendezvous bytes round.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <iostream>
#include <sstream>

#include "absl/time/clock.h"
#include "tests/collective/scenario.h"
#include "worker/collective/rendezvous.h"

extern char** environ;

namespace lockstep::collective {
namespace {

constexpr unsigned kMostSeconds = 200;  // of a member: one that hangs fails its test, no other

std::string Encode(const Scenario& s) {
  std::ostringstream out;
  out << s.size << ' ' << s.bucket_bytes << ' ' << s.steps << ' ' << static_cast<int>(s.presence)
      << ' ' << s.exact << ' ' << s.seed << ' ' << s.victim << ' ' << s.signal << ' '
      << s.victim_step << ' ' << s.deadline_ms << ' ' << s.most_abort_ms << ' ' << s.abort_ms << ' '
      << s.gpus << ' ' << s.members.size();
  for (const ScenarioMember& member : s.members) {
    out << ' ' << member.host << ' ' << member.gpu << ' ' << member.address << ' '
        << member.bounds.size();
    for (const int bound : member.bounds) out << ' ' << bound;
  }
  return out.str();
}

Scenario Decode(const std::string& text) {
  std::istringstream in(text);
  Scenario s;
  int presence = 0;
  size_t members = 0, bounds = 0;
  in >> s.size >> s.bucket_bytes >> s.steps >> presence >> s.exact >> s.seed >> s.victim >>
      s.signal >> s.victim_step >> s.deadline_ms >> s.most_abort_ms >> s.abort_ms >> s.gpus >>
      members;
  s.presence = static_cast<Presence>(presence);
  s.members.resize(members);
  for (ScenarioMember& member : s.members) {
    in >> member.host >> member.gpu >> member.address >> bounds;
    member.bounds.resize(bounds);
    for (int& bound : member.bounds) in >> bound;
  }
  return s;
}

bool ReadAll(int fd, void* data, size_t bytes) {
  auto* at = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t got = read(fd, at, bytes);
    if (got <= 0) return false;
    at += got;
    bytes -= got;
  }
  return true;
}

bool ReadString(int fd, std::string* text) {
  uint32_t length = 0;
  if (!ReadAll(fd, &length, sizeof(length))) return false;
  text->resize(length);
  return ReadAll(fd, text->data(), length);
}

bool WriteString(int fd, const std::string& text) {
  const uint32_t length = static_cast<uint32_t>(text.size());
  std::string all(reinterpret_cast<const char*>(&length), sizeof(length));
  all += text;
  return write(fd, all.data(), all.size()) == static_cast<ssize_t>(all.size());
}

std::string EncodeOutcome(const Outcome& outcome) {
  std::ostringstream out;
  const Traffic& t = outcome.traffic;
  out << static_cast<int>(outcome.status.code()) << ' ' << t.exchange_bytes << ' ' << t.gather_bytes
      << ' ' << t.small_bytes << ' ' << t.broadcast_bytes << ' ' << outcome.digests.size();
  for (const uint64_t digest : outcome.digests) out << ' ' << digest;
  out << '\n' << outcome.status.message();
  return out.str();
}

Outcome DecodeOutcome(const std::string& text) {
  std::istringstream in(text);
  Outcome outcome;
  int code = 0;
  size_t digests = 0;
  Traffic& t = outcome.traffic;
  in >> code >> t.exchange_bytes >> t.gather_bytes >> t.small_bytes >> t.broadcast_bytes >> digests;
  outcome.digests.resize(digests);
  for (uint64_t& digest : outcome.digests) in >> digest;
  std::string message;
  in.ignore();
  std::getline(in, message, '\0');
  outcome.status = absl::Status(static_cast<absl::StatusCode>(code), message);
  return outcome;
}

struct Child {
  pid_t pid = -1;
  int to = -1, from = -1;
};

Child Start(const std::string& encoded, int rank) {
  Child child;
  int in[2], out[2];
  if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0) return child;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in[0], 0);
  posix_spawn_file_actions_adddup2(&actions, out[1], 1);
  std::string program = "/proc/self/exe", mode = "--member", number = std::to_string(rank);
  std::string scenario = encoded;
  char* argv[] = {program.data(), mode.data(), scenario.data(), number.data(), nullptr};
  if (posix_spawn(&child.pid, program.c_str(), &actions, nullptr, argv, environ) != 0)
    child.pid = -1;
  posix_spawn_file_actions_destroy(&actions);
  close(in[0]);
  close(out[1]);
  child.to = in[1];
  child.from = out[0];
  return child;
}

}  // namespace

int MemberMain(const std::string& encoded, int rank) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // also when it is stopped and the test has failed
  alarm(kMostSeconds);
  const Scenario s = Decode(encoded);
  const int size = static_cast<int>(s.members.size());
  RendezvousOptions options;
  options.rank = rank;
  for (int member = 0; member < size; ++member) {
    options.members.push_back({"worker-" + std::to_string(member), s.members[member].host,
                               s.gpus ? s.members[member].gpu : ""});
  }
  options.gradients = GradientPath::kNccl;
  options.most_abort = absl::Milliseconds(s.most_abort_ms);
  options.staging_bytes = CanonicalAllReduce::StagingBytes(s.placement(), rank, s.size);
  options.address = s.members[rank].address;
  options.slots = static_cast<int>(s.members[rank].bounds.size()) - 1;
  options.shared_bytes = CanonicalAllReduce::SharedBytes(s.placement(), s.size, !s.gpus);
  Outcome outcome;
  auto rendezvous = OpenRendezvous(options);
  WriteString(1, rendezvous.ok() ? (*rendezvous)->bytes() : "");
  std::vector<std::string> all(size);
  for (std::string& bytes : all) {
    if (!ReadString(0, &bytes)) return 1;
  }
  outcome.status = rendezvous.status();
  if (rendezvous.ok()) {
    const absl::Time abort =
        s.abort_ms < 0 ? absl::InfiniteFuture() : absl::Now() + absl::Milliseconds(s.abort_ms);
    const auto aborted = [abort] {
      return absl::Now() < abort ? absl::OkStatus() : absl::AbortedError("the job is over");
    };
    auto communicator = (*rendezvous)->Connect(all, absl::Now() + absl::Minutes(1), aborted);
    outcome.status = communicator.status();
    if (communicator.ok()) outcome = RunMember(s, rank, communicator->get());
  }
  WriteString(1, EncodeOutcome(outcome));
  return 0;
}

std::vector<Outcome> RunProcesses(const Scenario& s) {
  const int size = static_cast<int>(s.members.size());
  const std::string encoded = Encode(s);
  std::vector<Child> children;
  for (int rank = 0; rank < size; ++rank) children.push_back(Start(encoded, rank));
  std::vector<std::string> bytes(size);
  for (int rank = 0; rank < size; ++rank) ReadString(children[rank].from, &bytes[rank]);
  for (const Child& child : children) {
    for (const std::string& one : bytes) WriteString(child.to, one);
  }
  std::vector<Outcome> outcomes(size);
  for (int rank = 0; rank < size; ++rank) {
    std::string text;
    outcomes[rank].status = absl::InternalError("the process ended without an outcome");
    if (rank == s.victim) continue;
    if (ReadString(children[rank].from, &text)) outcomes[rank] = DecodeOutcome(text);
  }
  for (int rank = 0; rank < size; ++rank) {
    if (rank == s.victim) kill(children[rank].pid, SIGKILL);
    close(children[rank].to);
    close(children[rank].from);
    int status = 0;
    waitpid(children[rank].pid, &status, 0);
    if (rank != s.victim && status != 0) {
      outcomes[rank].status = absl::InternalError(
          WIFEXITED(status)
              ? "the process ended with exit code " + std::to_string(WEXITSTATUS(status))
              : "the process was ended by signal " + std::to_string(WTERMSIG(status)));
    }
  }
  return outcomes;
}

}  // namespace lockstep::collective
