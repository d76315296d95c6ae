// Supervision of real processes.
#include "client/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "client/local_cluster.h"
#include "common/fs.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

using ::testing::HasSubstr;

absl::Time Deadline() { return absl::Now() + absl::Seconds(30); }

SpawnOptions Shell(const std::string& script) {
  SpawnOptions options;
  options.arguments = {"/bin/sh", "-c", script};
  return options;
}

std::string TempFile(const std::string& name) {
  return ::testing::TempDir() + "/process_" + std::to_string(getpid()) + "_" + name;
}

// Signals that an earlier test of this process left behind.
void Drain(Interrupts& interrupts) {
  while (interrupts.Next() != 0) {
  }
}

bool Alive(pid_t pid) { return kill(pid, 0) == 0; }

TEST(Child, ReportsItsEnd) {
  absl::StatusOr<Child> child = Child::Spawn(Shell("exit 3"));
  ASSERT_TRUE(child.ok()) << child.status();
  ASSERT_TRUE(child->WaitUntil(Deadline()));
  EXPECT_EQ(child->exit_code(), 3);
  EXPECT_EQ(child->EndText(), "exit code 3");
  EXPECT_EQ(child->name(), "sh");
}

TEST(Child, ReportsASignal) {
  absl::StatusOr<Child> child = Child::Spawn(Shell("kill -9 $$"));
  ASSERT_TRUE(child.ok()) << child.status();
  ASSERT_TRUE(child->WaitUntil(Deadline()));
  EXPECT_EQ(child->exit_code(), -1);
  EXPECT_EQ(child->EndText(), "killed by signal 9 (Killed)");
}

TEST(Child, AMissingProgramIsAnErrorNotAChild) {
  SpawnOptions options;
  options.arguments = {"/nowhere/program"};
  const absl::StatusOr<Child> child = Child::Spawn(options);
  EXPECT_EQ(child.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(child.status().message()), HasSubstr("/nowhere/program"));
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child is left";
}

TEST(Child, DiesWithItsOwner) {
  pid_t pid;
  {
    absl::StatusOr<Child> child = Child::Spawn(Shell("exec sleep 1000"));
    ASSERT_TRUE(child.ok()) << child.status();
    pid = child->pid();
    EXPECT_TRUE(Alive(pid));
    EXPECT_FALSE(child->Ended());
  }
  EXPECT_FALSE(Alive(pid));
}

TEST(Child, HasItsOwnProcessGroupNoBlockedSignalsAndDefaultHandlers) {
  sigset_t set, before;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &set, &before);
  const auto old = signal(SIGPIPE, SIG_IGN);
  absl::StatusOr<Child> child = Child::Spawn(Shell("exec sleep 1000"));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  signal(SIGPIPE, old);
  ASSERT_TRUE(child.ok()) << child.status();
  EXPECT_EQ(getpgid(child->pid()), child->pid());
  child->Signal(SIGTERM);
  ASSERT_TRUE(child->WaitUntil(Deadline()));
  EXPECT_EQ(child->EndText(), "killed by signal 15 (Terminated)");
}

TEST(Child, WritesItsLogAndInheritsOnlyTheNamedFile) {
  int fds[2];
  ASSERT_EQ(pipe2(fds, O_CLOEXEC), 0);
  const int other = open("/dev/null", O_RDONLY | O_CLOEXEC);
  SpawnOptions options =
      Shell("echo to-log; echo err >&2; echo ready >&3; ls /proc/self/fd | wc -w >&3");
  options.log_path = TempFile("log");
  options.inherit_fd = fds[1];
  absl::StatusOr<Child> child = Child::Spawn(options);
  close(fds[1]);
  ASSERT_TRUE(child.ok()) << child.status();
  std::string said;
  char buffer[256];
  for (ssize_t n; (n = read(fds[0], buffer, sizeof(buffer))) > 0;) said.append(buffer, n);
  EXPECT_EQ(said, "ready\n5\n");  // 0 to 3, and the folder that ls reads
  ASSERT_TRUE(child->WaitUntil(Deadline()));
  EXPECT_EQ(*ReadFile(options.log_path, 1000), "to-log\nerr\n");
  EXPECT_EQ(LastLineOfFile(options.log_path), "err");
  close(fds[0]);
  close(other);
  unlink(options.log_path.c_str());
}

// The promise behind "leaves no process behind, also after its own SIGKILL": a parent that is
// killed takes its children with it.
TEST(Child, DiesWhenTheParentIsKilled) {
  int fds[2];
  ASSERT_EQ(pipe2(fds, O_CLOEXEC), 0);
  const pid_t parent = fork();
  if (parent == 0) {
    absl::StatusOr<Child> child = Child::Spawn(Shell("exec sleep 1000"));
    const pid_t pid = child.ok() ? child->pid() : -1;
    if (write(fds[1], &pid, sizeof(pid)) < 0) _exit(1);
    pause();
    _exit(0);
  }
  close(fds[1]);
  prctl(PR_SET_CHILD_SUBREAPER, 1);  // the orphan becomes ours to wait for
  pid_t orphan = -1;
  ASSERT_EQ(read(fds[0], &orphan, sizeof(orphan)), static_cast<ssize_t>(sizeof(orphan)));
  close(fds[0]);
  ASSERT_GT(orphan, 0);
  kill(parent, SIGKILL);
  ASSERT_EQ(waitpid(parent, nullptr, 0), parent);
  int status = 0;
  ASSERT_EQ(waitpid(orphan, &status, 0), orphan);
  prctl(PR_SET_CHILD_SUBREAPER, 0);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGKILL);
}

TEST(Child, DeadlinesEnd) {
  absl::StatusOr<Child> child = Child::Spawn(Shell("exec sleep 1000"));
  ASSERT_TRUE(child.ok()) << child.status();
  EXPECT_FALSE(child->WaitUntil(absl::Now()));
}

TEST(RunToEnd, PassesInputAndCollectsOutput) {
  Interrupts interrupts;
  Drain(interrupts);
  std::string input;
  for (int i = 0; i < 100000; ++i) input += "line\n";  // more than pipes hold
  const absl::StatusOr<Output> output = RunToEnd({"/bin/sh", "-c", "cat; echo done >&2; exit 2"},
                                                 input, interrupts, absl::Seconds(30));
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_EQ(output->exit_code, 2);
  EXPECT_EQ(output->out, input);
  EXPECT_EQ(output->err, "done\n");
}

TEST(RunToEnd, AProgramThatDoesNotReadItsInput) {
  Interrupts interrupts;
  Drain(interrupts);
  const absl::StatusOr<Output> output =
      RunToEnd({"/bin/true"}, std::string(1 << 20, 'x'), interrupts, absl::Seconds(30));
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_EQ(output->exit_code, 0);
}

TEST(RunToEnd, KillsAtTheDeadline) {
  Interrupts interrupts;
  Drain(interrupts);
  const absl::StatusOr<Output> output =
      RunToEnd({"/bin/sleep", "1000"}, "", interrupts, absl::Milliseconds(20));
  EXPECT_EQ(output.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child is left";
}

TEST(RunToEnd, KillsWhenInterrupted) {
  Interrupts interrupts;
  Drain(interrupts);
  kill(getpid(), SIGINT);  // pending: blocked by Interrupts
  const absl::StatusOr<Output> output =
      RunToEnd({"/bin/sleep", "1000"}, "", interrupts, absl::Seconds(30));
  EXPECT_EQ(output.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child is left";
}

TEST(Interrupts, ReportSignalsAndChildren) {
  Interrupts interrupts;
  Drain(interrupts);
  EXPECT_EQ(interrupts.Next(), 0);
  kill(getpid(), SIGTERM);
  EXPECT_EQ(interrupts.Next(), SIGTERM);
  EXPECT_EQ(interrupts.Next(), 0);
  absl::StatusOr<Child> child = Child::Spawn(Shell("exit 0"));
  ASSERT_TRUE(child.ok());
  pollfd polled{interrupts.fd(), POLLIN, 0};
  ASSERT_EQ(poll(&polled, 1, 30000), 1);
  EXPECT_EQ(interrupts.Next(), SIGCHLD);
}

TEST(Interrupts, ANohupStaysOne) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGHUP);
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  const auto old = signal(SIGHUP, SIG_IGN);
  {
    Interrupts interrupts;
    Drain(interrupts);
    kill(getpid(), SIGHUP);
    EXPECT_EQ(interrupts.Next(), 0);
  }
  signal(SIGHUP, old);
}

TEST(InterruptWatch, CallsOnceAndEndsTheProcessAtTheSecond) {
  EXPECT_EXIT(
      {
        Interrupts interrupts;
        Drain(interrupts);
        int fds[2];
        if (pipe(fds) != 0) _exit(1);
        InterruptWatch watch(interrupts, [&] {
          if (write(fds[1], "x", 1) != 1) _exit(1);
        });
        kill(getpid(), SIGINT);
        char c;
        if (read(fds[0], &c, 1) != 1 || !watch.interrupted()) _exit(2);
        kill(getpid(), SIGINT);
        pause();
        while (true) pause();
      },
      ::testing::ExitedWithCode(kExitInterrupted), "");
}

TEST(LastLine, SkipsBlankLines) {
  EXPECT_EQ(LastLine("one\ntwo\n\n  \n"), "two");
  EXPECT_EQ(LastLine("only"), "only");
  EXPECT_EQ(LastLine("\n"), "");
  EXPECT_EQ(LastLine(""), "");
  EXPECT_EQ(LastLineOfFile("/nowhere"), "");
}

// Scripts in place of the programs: how a local cluster answers programs that fail.
class LocalClusterTest : public ::testing::Test {
 protected:
  LocalClusterTest() : folder_(TempFile("cluster")) {
    Drain(interrupts_);
    EXPECT_TRUE(RemoveTree(folder_).ok());
    EXPECT_TRUE(MakeDirectories(folder_).ok());
    options_.folder = folder_;
    options_.server_program = Script("server", "echo 127.0.0.1:1 >&3; exec sleep 1000");
    options_.worker_program = Script("worker", "exec sleep 1000");
  }
  ~LocalClusterTest() override { RemoveTree(folder_).IgnoreError(); }

  std::string Script(const std::string& name, const std::string& body) {
    const std::string path = JoinPath(folder_, name);
    EXPECT_TRUE(WriteFileAtomically(path, "#!/bin/sh\n" + body + "\n").ok());
    EXPECT_EQ(chmod(path.c_str(), 0755), 0);
    return path;
  }

  std::string folder_;
  LocalClusterOptions options_;
  Interrupts interrupts_;
};

TEST_F(LocalClusterTest, StartsAndStopsAll) {
  options_.workers = 2;
  auto cluster = LocalCluster::Start(options_, interrupts_);
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  EXPECT_EQ((*cluster)->address(), "127.0.0.1:1");
  EXPECT_FALSE((*cluster)->NextLoss().has_value());
  (*cluster)->Stop();
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child is left";
}

TEST_F(LocalClusterTest, AServerThatFailsIsNamedWithItsLastWords) {
  options_.server_program = Script("broken", "echo 'lockstep-server: disk on fire' >&2; exit 4");
  const auto cluster = LocalCluster::Start(options_, interrupts_);
  EXPECT_EQ(cluster.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(
      std::string(cluster.status().message()),
      HasSubstr("the coordinator stopped (exit code 4): lockstep-server: disk on fire; log: "));
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child is left";
}

TEST_F(LocalClusterTest, ALostWorkerIsReportedOnce) {
  options_.worker_program = Script(
      "broken", "echo '[info] training'; echo 'lockstep-worker: no such device' >&2; exit 1");
  auto cluster = LocalCluster::Start(options_, interrupts_);
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  std::optional<LocalCluster::Loss> loss;
  for (const absl::Time deadline = Deadline(); !loss.has_value() && absl::Now() < deadline;) {
    pollfd polled{interrupts_.fd(), POLLIN, 0};
    poll(&polled, 1, 10);
    interrupts_.Next();
    loss = (*cluster)->NextLoss();
  }
  ASSERT_TRUE(loss.has_value());
  EXPECT_EQ(loss->worker, "worker-0");
  EXPECT_THAT(loss->text,
              HasSubstr("worker-0 stopped (exit code 1): lockstep-worker: no such device"));
  EXPECT_FALSE((*cluster)->NextLoss().has_value());
}

TEST_F(LocalClusterTest, CtrlCWhileItStarts) {
  options_.server_program = Script("slow", "exec sleep 1000");
  kill(getpid(), SIGINT);
  const auto cluster = LocalCluster::Start(options_, interrupts_);
  EXPECT_EQ(cluster.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child is left";
}

TEST_F(LocalClusterTest, KillTakesChildrenThatIgnoreTerm) {
  options_.worker_program = Script("stubborn", "trap '' TERM; while :; do sleep 1000; done");
  auto cluster = LocalCluster::Start(options_, interrupts_);
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  (*cluster)->Kill();
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child is left";
}

}  // namespace
}  // namespace lockstep::client
