// The real lockstep-server, started, killed and started again.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/common/temporary_folder.h"
#include "tests/server/client.h"
#include "tests/server/fake_worker.h"
#include "tests/server/tsan_options.h"

namespace lockstep::server {
namespace {

using testing::HasSubstr;

constexpr char kBinary[] = LOCKSTEP_BIN_DIR "/lockstep-server";

// A process of the server with its standard error in a file. Killed when it goes out of scope.
class ServerProcess {
 public:
  ServerProcess(const TemporaryFolder& folder, std::vector<std::string> arguments)
      : error_file_(folder / "stderr") {
    int ready[2];
    EXPECT_EQ(pipe(ready), 0);
    arguments.insert(arguments.begin(), kBinary);
    arguments.push_back(absl::StrCat("--ready-fd=", ready[1]));
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      close(ready[0]);
      const int file = open(error_file_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
      dup2(file, STDERR_FILENO);
      const char* given = getenv("TSAN_OPTIONS");
      const std::string options = absl::StrCat(kTsanOptions, " ", given == nullptr ? "" : given);
      setenv("TSAN_OPTIONS", options.c_str(), 1);
      std::vector<char*> argv;
      for (std::string& argument : arguments) argv.push_back(argument.data());
      argv.push_back(nullptr);
      execv(kBinary, argv.data());
      _exit(127);
    }
    close(ready[1]);
    char c;
    while (read(ready[0], &c, 1) == 1 && c != '\n') address_ += c;
    close(ready[0]);
  }
  ~ServerProcess() {
    if (pid_ > 0) Kill(SIGKILL);
  }

  // host:port; empty where it ended before it served.
  const std::string& address() const { return address_; }

  // The exit code, or minus the signal that ended it.
  int Wait() {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  int Kill(int signal) {
    kill(pid_, signal);
    return Wait();
  }
  std::string Errors() const {
    std::ifstream file(error_file_);
    return {std::istreambuf_iterator<char>(file), {}};
  }

 private:
  const std::string error_file_;
  std::string address_;
  pid_t pid_ = -1;
};

class ProcessTest : public testing::Test {
 protected:
  std::vector<std::string> Arguments(const std::string& listen = "127.0.0.1:0") const {
    return {"--listen", listen, "--data-dir", folder_ / "data"};
  }
  // One line that begins with the program's name.
  static void ExpectOneLine(const std::string& errors, const std::string& part) {
    EXPECT_THAT(errors, testing::StartsWith("lockstep-server: "));
    EXPECT_THAT(errors, HasSubstr(part));
    EXPECT_EQ(std::count(errors.begin(), errors.end(), '\n'), 1) << errors;
  }

  TemporaryFolder folder_;
};

TEST_F(ProcessTest, NothingAcknowledgedIsForgottenAfterSigkill) {
  std::string running;
  std::string done;
  std::vector<std::string> waiting;
  {
    ServerProcess server(folder_, Arguments());
    ASSERT_NE(server.address(), "");
    Client client(server.address());
    FakeWorker worker(server.address(), "w0", 1);
    done = client.Submit(SmallSpec())->id();
    v1::Prepare prepare = worker.StartJob();
    worker.SaySteps(prepare, 1, 5);
    worker.SayEnded(prepare, v1::Ended::COMPLETED);
    running = client.Submit(SmallSpec())->id();
    prepare = worker.StartJob();
    worker.SaySteps(prepare, 1, 42);
    std::vector<v1::JobEvent> events;
    ASSERT_EQ(client.Watch(running, 0, &events,
                           [](const v1::JobEvent& event) { return event.step().step() == 42; }),
              absl::OkStatus());
    for (int i = 0; i < 10; ++i) waiting.push_back(client.Submit(SmallSpec())->id());
    EXPECT_EQ(server.Kill(SIGKILL), -SIGKILL);
  }
  ServerProcess server(folder_, Arguments());
  ASSERT_NE(server.address(), "") << server.Errors();
  Client client(server.address());
  EXPECT_EQ(client.Get(done)->state(), v1::SUCCEEDED);
  EXPECT_EQ(client.Metrics(done)->steps_size(), 5);
  EXPECT_EQ(client.Get(running)->state(), v1::FAILED);
  EXPECT_EQ(client.Get(running)->reason(),
            "the coordinator was restarted at step 42; the job had no checkpoint yet");
  EXPECT_EQ(client.Metrics(running)->steps_size(), 42);
  for (const std::string& job : waiting) EXPECT_EQ(client.Get(job)->state(), v1::QUEUED) << job;
  FakeWorker worker(server.address(), "w0", 1);
  EXPECT_EQ(worker.StartJob().job(), waiting[0]);
}

TEST_F(ProcessTest, SigtermEndsItWhateverIsConnected) {
  ServerProcess server(folder_, Arguments());
  FakeWorker worker(server.address(), "w0", 1);
  Client client(server.address());
  ASSERT_TRUE(client.Submit(SmallSpec()).ok());
  worker.StartJob();
  EXPECT_EQ(server.Kill(SIGTERM), 0) << server.Errors();
}

TEST_F(ProcessTest, SigintEndsItToo) {
  ServerProcess server(folder_, Arguments());
  EXPECT_EQ(server.Kill(SIGINT), 0) << server.Errors();
}

TEST_F(ProcessTest, APortInUseIsOneLineAndExitCodeOne) {
  ServerProcess first(folder_, Arguments());
  TemporaryFolder other;
  ServerProcess second(other, {"--listen", first.address(), "--data-dir", other / "data"});
  EXPECT_EQ(second.address(), "");
  EXPECT_EQ(second.Wait(), 1);
  ExpectOneLine(second.Errors(),
                absl::StrCat("cannot listen on ", first.address(), ": Address already in use"));
}

TEST_F(ProcessTest, ADataFolderInUseIsOneLineAndExitCodeOne) {
  ServerProcess first(folder_, Arguments());
  TemporaryFolder other;
  ServerProcess second(other, Arguments());
  EXPECT_EQ(second.Wait(), 1);
  ExpectOneLine(second.Errors(), "is in use by another lockstep-server (process ");
}

TEST_F(ProcessTest, AnAddressBeyondTheMachineNeedsInsecure) {
  ServerProcess refused(folder_, Arguments("0.0.0.0:0"));
  EXPECT_EQ(refused.Wait(), 1);
  ExpectOneLine(refused.Errors(), "--insecure");
  std::vector<std::string> arguments = Arguments("0.0.0.0:0");
  arguments.push_back("--insecure");
  ServerProcess accepted(folder_, arguments);
  EXPECT_NE(accepted.address(), "");
  EXPECT_EQ(accepted.Kill(SIGTERM), 0);
  EXPECT_THAT(accepted.Errors(), HasSubstr("neither encrypted nor authenticated"));
}

TEST_F(ProcessTest, ADamagedDatabaseIsOneLineAndExitCodeOne) {
  std::filesystem::create_directories(folder_ / "data");
  std::ofstream(folder_ / "data/lockstep.db") << std::string(10'000, '?');
  ServerProcess server(folder_, Arguments());
  EXPECT_EQ(server.Wait(), 1);
  ExpectOneLine(server.Errors(), "file is not a database");
}

TEST_F(ProcessTest, WrongUsageIsExitCodeTwo) {
  ServerProcess server(folder_, {"--no-such-flag"});
  EXPECT_EQ(server.Wait(), 2);
  EXPECT_THAT(server.Errors(), HasSubstr("--no-such-flag"));
}

TEST_F(ProcessTest, DiesWithItsParent) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t parent = fork();
  if (parent == 0) {
    const std::string data = folder_ / "data";
    const std::string ready = absl::StrCat("--ready-fd=", ends[1]);
    const pid_t child = fork();
    if (child == 0) {
      // Only the server holds the write end of the pipe open from here on, twice.
      dup2(ends[1], 100);
      execl(kBinary, kBinary, "--listen", "127.0.0.1:0", "--data-dir", data.c_str(),
            "--die-with-parent", ready.c_str(), "--log-level", "off", nullptr);
      _exit(127);
    }
    close(ends[1]);
    char c;
    while (read(ends[0], &c, 1) == 1 && c != '\n') {
    }
    _exit(0);  // the server serves; its parent is gone
  }
  close(ends[1]);
  int status = 0;
  ASSERT_EQ(waitpid(parent, &status, 0), parent);
  char c;
  while (read(ends[0], &c, 1) == 1) {
  }  // to the end of the file: nobody holds the other end, so the server has ended
  close(ends[0]);
}

TEST_F(ProcessTest, HelpEndsWithAnExample) {
  FILE* help = popen(absl::StrCat(kBinary, " --help").c_str(), "r");
  std::string text;
  char buffer[4096];
  while (size_t n = fread(buffer, 1, sizeof(buffer), help)) text.append(buffer, n);
  EXPECT_EQ(pclose(help), 0);
  EXPECT_THAT(text, HasSubstr("Example:\n  lockstep-server --listen"));
  EXPECT_THAT(text, testing::EndsWith("--slots cpu:2\n"));
}

}  // namespace
}  // namespace lockstep::server
