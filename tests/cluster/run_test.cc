// `lockstep run` and the commands on what it leaves, through the real programs.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "absl/time/clock.h"
#include "common/fs.h"
#include "common/rpc/address.h"
#include "tests/cluster/programs.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;
using ::testing::Not;

// What the coordinator logs when it is asked to stop, and cannot when it is killed.
constexpr char kStopping[] = "info stopping\n";

class RunTest : public ::testing::Test {
 protected:
  std::string Out(const std::string& name = "run") { return programs_.JoinedPath(name); }

  // No process, no shared-memory file, nobody at the coordinator's port.
  void ExpectNothingLeft() {
    EXPECT_TRUE(Eventually([&] { return programs_.Survivors().empty(); }, absl::Seconds(10)));
    EXPECT_THAT(programs_.Survivors(), IsEmpty());
    const absl::StatusOr<std::vector<DirectoryEntry>> shared = ListDirectory("/dev/shm");
    ASSERT_TRUE(shared.ok());
    for (const DirectoryEntry& entry : *shared) EXPECT_THAT(entry.name, Not(HasSubstr("lockstep")));
    const std::string log = Content(Out() + "/logs/server.log");
    const size_t at = log.find("serves on ");
    if (at == std::string::npos) return;
    const std::string address = log.substr(at + 10, log.find(',', at) - at - 10);
    const auto parsed = rpc::ParseAddress(address);
    ASSERT_TRUE(parsed.ok()) << address;
    // A dying process is out of /proc's list of command lines before it closes its sockets.
    EXPECT_TRUE(Eventually([&] { return !Answers(*parsed); }, absl::Seconds(10))) << address;
  }

  static bool Answers(const rpc::Address& address) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(address.port);
    inet_pton(AF_INET, address.host.c_str(), &to.sin_addr);
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    const bool connected = connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0;
    close(fd);
    return connected;
  }

  // An endless run in the background, once it trains.
  client::Child StartEndless(const std::vector<std::string>& arguments = {"--workers", "2",
                                                                          "--slots", "1"}) {
    std::vector<std::string> all = {"run", programs_.EndlessSpec("endless"), "--out", Out(), "-o",
                                    "json"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    client::Child run = programs_.Start(all, "run.log");
    EXPECT_TRUE(Eventually([&] {
      return Content(programs_.JoinedPath("run.log")).find("step ") != std::string::npos;
    })) << Content(programs_.JoinedPath("run.log"));
    return run;
  }
  nlohmann::json LastJson() {
    std::string log = Content(programs_.JoinedPath("run.log"));
    const size_t begin = log.rfind("{\"job\"");
    return begin == std::string::npos
               ? nlohmann::json()
               : nlohmann::json::parse(log.substr(begin, log.find('\n', begin) - begin), nullptr,
                                       false);
  }
  // Pid of a child of the run whose command line has `text`.
  int PidOf(const std::string& text) {
    for (const std::string& line : programs_.Survivors()) {
      if (line.find(text) != std::string::npos) return std::stoi(line);
    }
    ADD_FAILURE() << "no process of " << text;
    return -1;
  }
  // Whether a signal that was sent to the process, which blocks it and reads it from a descriptor,
  // has not been read yet.
  static bool Pending(pid_t pid, int signal) {
    constexpr char kField[] = "\nShdPnd:\t";
    const std::string status = Content("/proc/" + std::to_string(pid) + "/status");
    const size_t at = status.find(kField);
    EXPECT_NE(at, std::string::npos) << status;
    if (at == std::string::npos) return false;
    return std::stoull(status.substr(at + strlen(kField), 16), nullptr, 16) >> (signal - 1) & 1;
  }

  Programs programs_;
};

TEST_F(RunTest, SucceedsAndLeavesItsFilesAndNothingElse) {
  const Programs::Result result =
      programs_.Lockstep({"run", programs_.Spec("small"), "--out", Out(), "-o", "json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(std::count(result.out.begin(), result.out.end(), '\n'), 1) << result.out;
  const nlohmann::json json = result.json();
  EXPECT_EQ(json["state"], "SUCCEEDED");
  EXPECT_EQ(json["reason"], "");
  EXPECT_EQ(json["steps"], 16);
  EXPECT_EQ(json["epochs"], 2);
  EXPECT_GT(json["train"]["loss"], 0);
  EXPECT_GT(json["validation"]["accuracy"], 0.2);
  EXPECT_LE(json["validation"]["accuracy"], 1);
  EXPECT_GT(json["samples_per_second"], 0);
  EXPECT_GT(json["seconds"], 0);
  EXPECT_EQ(json["parameter_digest"].get<std::string>().size(), 32u);
  EXPECT_EQ(json["state_digest"].get<std::string>().size(), 32u);
  EXPECT_EQ(json["out"], Out());
  EXPECT_EQ(nlohmann::json::parse(Content(Out() + "/result.json")), json);
  const std::string csv = Content(Out() + "/metrics.csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 17);
  EXPECT_TRUE(RealFileSystem().IsDirectory(json["checkpoint"].get<std::string>()));
  EXPECT_THAT(Content(Out() + "/spec.yaml"), HasSubstr("hidden: [16]"));
  EXPECT_THAT(Content(Out() + "/logs/worker-0.log"), HasSubstr("small-1"));
  ExpectNothingLeft();
}

TEST_F(RunTest, PlainLinesAndATableWithoutATerminal) {
  const Programs::Result result = programs_.Lockstep(
      {"run", programs_.Spec("small"), "--out", Out(), "--set", "train.evaluate.every_epochs=1"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(result.out, Not(HasSubstr("\x1b")));
  EXPECT_THAT(result.out, Not(HasSubstr("\r")));
  EXPECT_THAT(result.out, HasSubstr("epoch 1/2  step 8  train loss"));
  EXPECT_THAT(result.out, HasSubstr("epoch 2/2  step 16  train loss"));
  for (const char* part : {"small-1 SUCCEEDED", "state digest", "checkpoint", "metrics.csv", "logs",
                           "Try next", "lockstep evaluate"}) {
    EXPECT_THAT(result.out, HasSubstr(part));
  }
}

TEST_F(RunTest, ABarOnATerminal) {
  const int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
  ASSERT_EQ(grantpt(master), 0);
  ASSERT_EQ(unlockpt(master), 0);
  const int slave = open(ptsname(master), O_RDWR | O_NOCTTY | O_CLOEXEC);
  winsize size{25, 90, 0, 0};
  ioctl(slave, TIOCSWINSZ, &size);
  client::SpawnOptions options;
  options.arguments = {"/usr/bin/env", "TERM=xterm",
                       "NO_COLOR=1",   std::string(LOCKSTEP_BIN_DIR) + "/lockstep",
                       "run",          programs_.Spec("small"),
                       "--out",        Out()};
  options.stdout_fd = slave;
  options.log_path = programs_.JoinedPath("run.log");
  absl::StatusOr<client::Child> run = client::Child::Spawn(options);
  close(slave);
  ASSERT_TRUE(run.ok()) << run.status();
  std::string screen;
  char buffer[4096];
  for (ssize_t n; (n = read(master, buffer, sizeof(buffer))) > 0;) screen.append(buffer, n);
  close(master);
  ASSERT_TRUE(run->WaitUntil(absl::Now() + absl::Seconds(30)));
  EXPECT_EQ(run->exit_code(), 0) << screen;
  EXPECT_THAT(screen, HasSubstr("\r"));
  EXPECT_THAT(screen, HasSubstr("\x1b[K"));       // redrawn in place
  EXPECT_THAT(screen, Not(HasSubstr("\x1b[3")));  // NO_COLOR
  EXPECT_THAT(screen, HasSubstr("epoch 2/2"));
  EXPECT_THAT(screen, HasSubstr("small-1 SUCCEEDED"));
}

TEST_F(RunTest, BadUsageAndSpecsExitWith2AndOneLine) {
  const std::string spec = programs_.Spec("small");
  const std::string broken = programs_.JoinedPath("broken.yaml");
  std::ofstream(broken) << "name: x\ntrain: {batch: 64, epoks: 2}\n";
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"run"}, "SPEC"},
      {{"run", spec, "--wrokers", "2"}, "--wrokers"},
      {{"run", spec, "--workers", "0"}, "--workers"},
      {{"run", spec, "-o", "xml"}, "xml"},
      {{"frob"}, "lockstep --help"},
      {{"run", programs_.JoinedPath("none.yaml")}, "none.yaml"},
      {{"run", broken}, "broken.yaml:2"},
      {{"run", spec, "--set", "train.shards=65"}, "--set train.shards=65"},
      {{"run", spec, "--set", "train.batch=many"}, "train.batch"},
      {{"run", spec, "--slots", "2", "--set", "resources.slots=3"}, "resources.slots"},
      {{"run", spec, "--resume", programs_.JoinedPath("none")}, "--resume"},
      {{"run", spec, "--out", spec + "/x"}, "--out DIR"},
      {{"explain", spec, "--slots", "1,x"}, "--slots"},
      {{"explain", broken}, "broken.yaml:2"},
      {{"evaluate", programs_.JoinedPath("none")}, "none"},
      {{"doctor", "--device", "tpu"}, "{cpu,cuda}"},
      {{"diff", programs_.folder(), programs_.folder()}, "digests.jsonl"},
      {{"submit", spec, "--coordinator", "10.1.2.3:7070"}, "--insecure"},
      {{"jobs", "--coordinator", "nonsense"}, "HOST:PORT"},
  };
  for (const auto& [arguments, expected] : cases) {
    const Programs::Result result = programs_.Lockstep(arguments);
    EXPECT_EQ(result.code, 2) << arguments[0] << " " << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    EXPECT_THAT(result.err, HasSubstr(expected));
    EXPECT_THAT(result.out, IsEmpty());
  }
}

TEST_F(RunTest, EveryCommandsHelpEndsWithAnExample) {
  for (const char* command : {"run", "submit", "jobs", "describe", "watch", "logs", "metrics",
                              "cancel", "workers", "explain", "evaluate", "doctor", "diff"}) {
    const Programs::Result result = programs_.Lockstep({command, "--help"});
    EXPECT_EQ(result.code, 0);
    const size_t at = result.out.rfind("Example:\n  lockstep " + std::string(command));
    ASSERT_NE(at, std::string::npos) << result.out;
    EXPECT_EQ(std::count(result.out.begin() + at, result.out.end(), '\n'), 2) << result.out;
    EXPECT_THAT(result.out, HasSubstr("-o,--output"));
  }
  EXPECT_EQ(programs_.Lockstep({"--version"}).out.rfind("lockstep ", 0), 0u);
}

TEST_F(RunTest, MissingDataFailsWithOneLine) {
  const std::string data = programs_.JoinedPath("nothing");
  const Programs::Result result = programs_.Lockstep(
      {"run", programs_.Spec("small"), "--set", "data.path=" + data, "--out", Out(), "-o", "json"});
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(ErrorLines(result.err), 1) << result.err;
  EXPECT_THAT(result.err, HasSubstr(data));
  EXPECT_EQ(result.json()["state"], "FAILED");
  EXPECT_THAT(result.json()["reason"].get<std::string>(), HasSubstr(data));
  ExpectNothingLeft();
}

TEST_F(RunTest, NonFiniteLossNamesStepAndTensor) {
  const Programs::Result result = programs_.Lockstep(
      {"run", programs_.Spec("small"), "--set", "optimizer.learning_rate=1000000", "--set",
       "optimizer.l2=1", "--set", "model.batch_norm=false", "--out", Out(), "-o", "json"});
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(ErrorLines(result.err), 1) << result.err;
  const std::string reason = result.json()["reason"];
  EXPECT_THAT(reason, HasSubstr("step "));
  EXPECT_THAT(reason, HasSubstr("dense_"));
  EXPECT_EQ(result.json()["state"], "FAILED");
}

// On a file system of a megabyte, where the machine lets us mount one; the checkpoint needs six.
// Only the checkpoints are on it, so that nothing else fills it first.
TEST_F(RunTest, AFullDiskAtACheckpointFailsWithOneLine) {
  const std::string disk = Out() + "/checkpoints";
  ASSERT_TRUE(MakeDirectories(disk).ok());
  const std::string mount = "mount -t tmpfs -o size=1m tmpfs " + disk;
  const std::vector<std::string> unshare = {"/usr/bin/unshare", "-r", "-m", "/bin/sh", "-c"};
  const auto inside = [&](const std::string& command) {
    std::vector<std::string> arguments = unshare;
    arguments.push_back(mount + " && " + command);
    return programs_.Execute(arguments);
  };
  if (inside("true").code != 0) GTEST_SKIP() << "no user namespaces here";
  const Programs::Result result =
      inside(std::string("exec ") + LOCKSTEP_BIN_DIR + "/lockstep run " + programs_.Spec("small") +
             " --set model.hidden=[1000] --out " + Out() + " -o json");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(ErrorLines(result.err), 1) << result.err;
  const std::string reason = result.json().value("reason", "");
  EXPECT_THAT(reason, HasSubstr("checkpoint of step 8"));
  EXPECT_THAT(reason, HasSubstr("No space left on device"));
  EXPECT_THAT(Content(Out() + "/logs/server.log"), HasSubstr("serves on "));  // it is checked
  ExpectNothingLeft();
}

class InterruptedRunTest : public RunTest, public ::testing::WithParamInterface<int> {};

TEST_P(InterruptedRunTest, CancelsAndExitsWith130) {
  client::Child run = StartEndless();
  run.Signal(GetParam());
  ASSERT_TRUE(run.WaitUntil(absl::Now() + absl::Seconds(10)));
  EXPECT_EQ(run.exit_code(), 130) << Content(programs_.JoinedPath("run.log"));
  EXPECT_EQ(LastJson()["state"], "CANCELLED");
  EXPECT_GT(LastJson()["steps"], 0);
  EXPECT_THAT(Content(Out() + "/logs/server.log"), HasSubstr("CANCELLED"));
  ExpectNothingLeft();
}

INSTANTIATE_TEST_SUITE_P(Signals, InterruptedRunTest, ::testing::Values(SIGINT, SIGTERM, SIGHUP),
                         [](const auto& info) { return std::string(sigabbrev_np(info.param)); });

TEST_F(RunTest, TheSecondCtrlCKillsAtOnce) {
  client::Child run = StartEndless();
  kill(PidOf("--name worker-0"), SIGSTOP);  // so that cancelling cannot come to an end
  const absl::Time pressed = absl::Now();
  run.Signal(SIGINT);
  // Until the first is taken, a second would be one with it.
  ASSERT_TRUE(Eventually([&] { return !Pending(run.pid(), SIGINT); }));
  run.Signal(SIGINT);
  ASSERT_TRUE(run.WaitUntil(absl::Now() + absl::Seconds(10)));
  EXPECT_EQ(run.exit_code(), 130);
  // Giving up on the job takes 2 seconds, and on the worker 3 more; then the coordinator is asked
  // to stop, and says so.
  EXPECT_LT(absl::Now() - pressed, absl::Seconds(4));
  EXPECT_THAT(Content(Out() + "/logs/server.log"), Not(HasSubstr(kStopping)));
  ExpectNothingLeft();
}

TEST_F(RunTest, AStoppedWorkerDoesNotHoldUpCtrlC) {
  client::Child run = StartEndless();
  kill(PidOf("--name worker-1"), SIGSTOP);
  run.Signal(SIGINT);
  ASSERT_TRUE(run.WaitUntil(absl::Now() + absl::Seconds(15)));
  EXPECT_EQ(run.exit_code(), 130);
  EXPECT_THAT(Content(Out() + "/logs/server.log"), HasSubstr(kStopping));
  ExpectNothingLeft();
}

TEST_F(RunTest, ItsOwnSigkillLeavesNothing) {
  client::Child run = StartEndless();
  EXPECT_EQ(programs_.Survivors().size(), 4u);
  run.Signal(SIGKILL);
  ASSERT_TRUE(run.WaitUntil(absl::Now() + absl::Seconds(10)));
  ExpectNothingLeft();
}

TEST_F(RunTest, AKilledWorkerFailsTheRun) {
  client::Child run = StartEndless();
  const absl::Time killed = absl::Now();
  kill(PidOf("--name worker-1"), SIGKILL);
  ASSERT_TRUE(run.WaitUntil(absl::Now() + absl::Seconds(20)));
  EXPECT_LT(absl::Now() - killed, absl::Seconds(10));
  EXPECT_EQ(run.exit_code(), 1);
  const nlohmann::json json = LastJson();
  EXPECT_EQ(json["state"], "FAILED");
  const std::string reason = json["reason"];
  EXPECT_THAT(reason, HasSubstr("worker-1"));
  EXPECT_THAT(reason, HasSubstr("slot"));
  EXPECT_THAT(reason, HasSubstr("step"));
  ExpectNothingLeft();
}

TEST_F(RunTest, AKilledCoordinatorFailsTheRun) {
  client::Child run = StartEndless();
  kill(PidOf("lockstep-server"), SIGKILL);
  ASSERT_TRUE(run.WaitUntil(absl::Now() + absl::Seconds(20)));
  EXPECT_EQ(run.exit_code(), 1);
  // Nothing of its log stands between: it had no last words.
  EXPECT_THAT(
      LastJson()["reason"].get<std::string>(),
      MatchesRegex("the coordinator stopped \\(killed by signal 9 \\(Killed\\)\\); log: .*"));
  ExpectNothingLeft();
}

TEST_F(RunTest, ACoordinatorThatHangsFailsTheRun) {
  client::Child run = StartEndless();
  kill(PidOf("lockstep-server"), SIGSTOP);
  ASSERT_TRUE(run.WaitUntil(absl::Now() + absl::Seconds(60)));
  EXPECT_EQ(run.exit_code(), 1);
  EXPECT_EQ(LastJson()["reason"], "the coordinator no longer answers");
  ExpectNothingLeft();
}

TEST_F(RunTest, MoreSlotsThanCoresAndWorkersThanShards) {
  const Programs::Result result =
      programs_.Lockstep({"run", programs_.Spec("small"), "--set", "train.shards=3", "--workers",
                          "2", "--slots", "4", "--out", Out(), "-o", "json"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.json()["state"], "SUCCEEDED");
  EXPECT_THAT(Content(Out() + "/spec.yaml"), HasSubstr("slots: 3"));
}

TEST_F(RunTest, ResumesEvaluatesAndCompares) {
  const std::string spec = programs_.Spec("small");
  const nlohmann::json whole =
      programs_.Lockstep({"run", spec, "--out", Out("whole"), "-o", "json"}).json();
  ASSERT_EQ(programs_.Lockstep({"run", spec, "--set", "train.steps=5", "--out", Out("part")}).code,
            0);
  // On in the same folder, on another placement.
  const Programs::Result resumed = programs_.Lockstep(
      {"run", spec, "--resume", Out("part"), "--out", Out("part"), "--workers", "2", "-o", "json"});
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_EQ(resumed.json()["state_digest"], whole["state_digest"]);
  EXPECT_EQ(resumed.json()["validation"], whole["validation"]);

  // The metrics of the first part are still there.
  const auto column = [&](const std::string& run) {
    std::istringstream csv(Content(Out(run) + "/metrics.csv"));
    std::vector<std::string> digests;
    for (std::string line; std::getline(csv, line);) {
      digests.push_back(line.substr(line.rfind(',') + 1));
    }
    return digests;
  };
  EXPECT_EQ(column("whole").size(), 17u);
  EXPECT_EQ(column("part"), column("whole"));

  const Programs::Result equal = programs_.Lockstep({"diff", Out("whole"), Out("part")});
  EXPECT_EQ(equal.code, 0) << equal.err;
  EXPECT_THAT(equal.out, HasSubstr("equal over 16 steps"));

  const Programs::Result scored = programs_.Lockstep({"evaluate", Out("whole"), "-o", "json"});
  ASSERT_EQ(scored.code, 0) << scored.err;
  EXPECT_EQ(scored.json()["validation"], whole["validation"]);
  EXPECT_EQ(scored.json()["state_digest"], whole["state_digest"]);
  EXPECT_EQ(scored.json()["step"], 16);
  EXPECT_THAT(programs_.Lockstep({"evaluate", Out("whole")}).out, HasSubstr("accuracy"));

  ASSERT_EQ(
      programs_
          .Lockstep({"run", spec, "--set", "optimizer.learning_rate=0.04", "--out", Out("other")})
          .code,
      0);
  const Programs::Result different =
      programs_.Lockstep({"diff", Out("whole"), Out("other"), "-o", "json"});
  EXPECT_EQ(different.code, 1);
  EXPECT_EQ(different.json()["step"], 1);
  EXPECT_FALSE(different.json()["tensors"].empty());
}

TEST_F(RunTest, AtItsEndResumesToTheSameResult) {
  const std::string spec = programs_.Spec("small");
  nlohmann::json whole = programs_.Lockstep({"run", spec, "--out", Out(), "-o", "json"}).json();
  const std::string csv = Content(Out() + "/metrics.csv");
  nlohmann::json again =
      programs_.Lockstep({"run", spec, "--resume", Out(), "--out", Out(), "-o", "json"}).json();
  for (const char* field : {"steps", "epochs", "train", "validation", "parameter_digest",
                            "state_digest", "checkpoint", "state"}) {
    EXPECT_EQ(again[field], whole[field]) << field;
  }
  EXPECT_EQ(Content(Out() + "/metrics.csv"), csv);
}

TEST_F(RunTest, ADamagedCheckpointIsPassedOverWithAWarning) {
  const std::string spec =
      programs_.Spec("small", "checkpoint: {every_steps: 4}\nresources: {slots: 2}\n");
  ASSERT_EQ(programs_.Lockstep({"run", spec, "--slots", "2", "--out", Out("first")}).code, 0);
  const std::string newest = Out("first") + "/checkpoints/step-00000016";
  std::ofstream(newest + "/model.safetensors", std::ios::app) << "x";
  const Programs::Result resumed = programs_.Lockstep(
      {"run", spec, "--slots", "2", "--resume", Out("first"), "--out", Out("second")});
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_EQ(std::count(resumed.err.begin(), resumed.err.end(), '\n'), 1) << resumed.err;
  EXPECT_THAT(resumed.err, MatchesRegex("lockstep: warning: checkpoint step-00000016 is not used: "
                                        ".*; going on from .*/step-00000012, step 12\n"));
  const Programs::Result scored = programs_.Lockstep({"evaluate", Out("first")});
  ASSERT_EQ(scored.code, 0) << scored.err;
  EXPECT_THAT(scored.err, MatchesRegex("lockstep: warning: checkpoint step-00000016 is not used: "
                                       ".*; scoring .*/step-00000012, step 12\n"));
}

TEST_F(RunTest, WhatItPrintsToDoNextRunsTheSpecAsItWas) {
  const Programs::Result result =
      programs_.Lockstep({"run", programs_.Spec("small"), "--set", "train.steps=3", "--slots", "3",
                          "--out", Out("it's")});
  ASSERT_EQ(result.code, 0) << result.err;
  const std::string folder = programs_.folder() + "/it'\\''s";
  EXPECT_THAT(result.out, HasSubstr("lockstep run '" + folder + "/spec.yaml' --slots 3 --resume '" +
                                    folder + "' --set train.epochs=4 --set train.steps=6"));
  EXPECT_THAT(result.out, HasSubstr("lockstep evaluate '" + folder + "'"));
  EXPECT_THAT(Content(Out("it's") + "/spec.yaml"), HasSubstr("steps: 3"));
}

// A longer cosine differs from its first step: what is printed must not be refused when it is run.
TEST_F(RunTest, ACosineIsNotGoneOnFromButRunAnew) {
  const std::string spec = programs_.Spec("small", "schedule: {type: cosine}\n");
  const Programs::Result result = programs_.Lockstep({"run", spec, "--out", Out()});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("/spec.yaml --set train.epochs=4"));
  EXPECT_THAT(result.out, HasSubstr("twice as long, from the start"));
  EXPECT_THAT(result.out, Not(HasSubstr("--resume")));
  const Programs::Result longer = programs_.Lockstep(
      {"run", spec, "--resume", Out(), "--set", "train.epochs=4", "--out", Out("longer")});
  EXPECT_EQ(longer.code, 1);
  EXPECT_THAT(longer.err, HasSubstr("made with a cosine schedule of steps 16, the spec says 32"));
}

TEST_F(RunTest, StandardOutputThatCannotBeWrittenIsAnError) {
  const std::string lockstep = std::string(LOCKSTEP_BIN_DIR) + "/lockstep ";
  for (const std::string& command :
       {"explain " + programs_.Spec("small"), std::string("--help"), std::string("--version"),
        "run " + programs_.Spec("small") + " -o json --out " + Out()}) {
    const Programs::Result result =
        programs_.Execute({"/bin/sh", "-c", "exec " + lockstep + command + " > /dev/full"});
    EXPECT_EQ(result.code, 1) << command;
    EXPECT_THAT(result.err,
                HasSubstr("lockstep: cannot write standard output: No space left on device\n"));
    EXPECT_EQ(ErrorLines(result.err), 1) << result.err;
  }
  // A reader that has seen enough is no error.
  EXPECT_EQ(programs_.Execute({"/bin/sh", "-c", lockstep + "--help | true"}).err, "");
}

TEST_F(RunTest, AnEarlierRunIsMovedAside) {
  const std::string spec = programs_.Spec("small");
  for (int i = 0; i < 2; ++i) {
    const Programs::Result result =
        programs_.Lockstep({"run", spec, "--out", Out(), "-o", "json", "--set",
                            "train.steps=" + std::to_string(3 + i)});
    ASSERT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(result.json()["steps"], 3 + i);
    EXPECT_EQ(result.json()["job"], "small-1");
  }
  EXPECT_EQ(nlohmann::json::parse(Content(Out() + ".1/result.json"))["steps"], 3);
}

TEST_F(RunTest, TheFolderInUseIsLeftAlone) {
  client::Child run = StartEndless();
  const Programs::Result result =
      programs_.Lockstep({"run", programs_.Spec("small"), "--out", Out()});
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("another `lockstep run` uses"));
  EXPECT_FALSE(run.Ended());
}

TEST_F(RunTest, ExplainShowsWhatTheWorkerPlans) {
  const std::string spec = programs_.Spec("small");
  const Programs::Result table = programs_.Lockstep({"explain", spec});
  ASSERT_EQ(table.code, 0) << table.err;
  for (const char* part : {"dense_1", "784", "12,544", "total", "4-7", "learning_rate: 0.05"}) {
    EXPECT_THAT(table.out, HasSubstr(part));
  }
  const Programs::Result json = programs_.Lockstep({"explain", spec, "--slots", "3", "-o", "json"});
  ASSERT_EQ(json.code, 0) << json.err;
  EXPECT_EQ(json.json()["layers"][1]["name"], "dense_1");
  EXPECT_EQ(json.json()["layers"][1]["parameters"], 784 * 16);
  EXPECT_GT(json.json()["memory"]["total_bytes"], 0);
  EXPECT_EQ(json.json()["placements"].size(), 1u);
  EXPECT_EQ(json.json()["placements"][0]["holds"][1]["first_shard"], 2);
  EXPECT_EQ(json.json()["spec"]["train"]["shards"], 8);
}

}  // namespace
}  // namespace lockstep
