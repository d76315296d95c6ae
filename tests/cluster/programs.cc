#include "tests/cluster/programs.h"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/fs.h"
#include "tests/cluster/shell.h"

namespace lockstep {
namespace {

constexpr char kBin[] = LOCKSTEP_BIN_DIR;
constexpr absl::Duration kCommandTimeout = absl::Seconds(120);

bool TakesCoordinator(const std::string& command) {
  for (const char* other :
       {"run", "explain", "evaluate", "doctor", "diff", "--version", "--help"}) {
    if (command == other) return false;
  }
  return true;
}

// A loopback address of this process alone: a server that is restarted finds its port free,
// although other tests run beside this one. A pid has at most 22 bits.
std::string OwnHost() {
  const int pid = getpid();
  return absl::StrCat("127.", 64 + (pid >> 16), ".", pid >> 8 & 255, ".", pid & 255);
}

}  // namespace

Programs::Programs() {
  folder_ = "/tmp/lockstep-cluster-XXXXXX";
  EXPECT_NE(mkdtemp(folder_.data()), nullptr);
  mark_ = absl::StrCat("LOCKSTEP_TEST_MARK=", folder_);
  setenv("LOCKSTEP_TEST_MARK", folder_.c_str(), 1);
  setenv("TZ", "UTC", 1);
  unsetenv("LOCKSTEP_COORDINATOR");
}

Programs::~Programs() {
  workers_.clear();
  server_.reset();
  // What its parent's death kills needs a moment to be gone.
  Eventually([&] { return Survivors().empty(); }, absl::Seconds(10));
  for (const std::string& survivor : Survivors()) {
    kill(std::stoi(survivor), SIGKILL);
    ADD_FAILURE() << "left behind: " << survivor;
  }
  if (::testing::Test::HasFailure()) {
    for (const char* log :
         {"server.log", "w0.log", "w1.log", "run/logs/server.log", "run/logs/worker-0.log"}) {
      const std::string text = Content(JoinedPath(log));
      if (!text.empty()) std::cerr << "---- " << log << "\n" << text;
    }
  }
  EXPECT_TRUE(RemoveTree(folder_).ok());
}

std::string Programs::JoinedPath(const std::string& name) const { return JoinPath(folder_, name); }

std::string Programs::Spec(const std::string& name, const std::string& extra) {
  const std::string path = JoinedPath(name + ".yaml");
  std::ofstream(path) << "name: " << name << R"(
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 512, validation_samples: 200}
model: {preset: mlp, hidden: [16]}
optimizer: {type: momentum, learning_rate: 0.05}
)" << (extra.find("train:") == std::string::npos ? "train: {batch: 64, epochs: 2}\n" : "")
                      << extra;
  return path;
}

std::string Programs::EndlessSpec(const std::string& name, const std::string& extra) {
  return Spec(name,
              "train: {batch: 256, epochs: 1000000, digest_every: 0, evaluate: {every_epochs: 0}}\n"
              "checkpoint: {every_epochs: 0}\n" +
                  extra);
}

void Programs::StartServer() {
  int ready[2];
  ASSERT_EQ(pipe2(ready, O_CLOEXEC), 0);
  client::SpawnOptions options;
  options.arguments = {absl::StrCat(kBin, "/lockstep-server"),
                       "--listen",
                       address_.empty() ? OwnHost() + ":0" : address_,
                       "--data-dir",
                       JoinedPath("server"),
                       "--ready-fd",
                       absl::StrCat(client::kInheritedFd)};
  options.log_path = JoinedPath("server.log");
  options.inherit_fd = ready[1];
  absl::StatusOr<client::Child> child = client::Child::Spawn(options);
  close(ready[1]);
  ASSERT_TRUE(child.ok()) << child.status();
  server_ = std::make_unique<client::Child>(*std::move(child));
  std::string line;
  char c;
  while (read(ready[0], &c, 1) == 1 && c != '\n') line += c;
  close(ready[0]);
  ASSERT_FALSE(line.empty()) << Content(JoinedPath("server.log"));
  address_ = line;
}

void Programs::KillServer(int signal) {
  server_->Signal(signal);
  ASSERT_TRUE(server_->WaitUntil(absl::Now() + absl::Seconds(10)));
}

void Programs::StartWorker(const std::string& name, int slots,
                           const std::vector<std::string>& arguments,
                           const std::vector<std::string>& environment) {
  StartWorker(name, absl::StrCat("cpu:", slots), arguments, environment);
}

void Programs::StartWorker(const std::string& name, const std::string& slots,
                           const std::vector<std::string>& arguments,
                           const std::vector<std::string>& environment) {
  client::SpawnOptions options;
  options.arguments = {"/usr/bin/env"};
  for (const std::string& variable : environment) options.arguments.push_back(variable);
  for (const std::string& argument :
       {absl::StrCat(kBin, "/lockstep-worker"), std::string("--coordinator"), address_,
        std::string("--slots"), slots, std::string("--name"), name, std::string("--work-dir"),
        JoinedPath(name)}) {
    options.arguments.push_back(argument);
  }
  options.arguments.insert(options.arguments.end(), arguments.begin(), arguments.end());
  options.log_path = WorkerLog(name);
  absl::StatusOr<client::Child> child = client::Child::Spawn(options);
  ASSERT_TRUE(child.ok()) << child.status();
  workers_[name] = std::make_unique<client::Child>(*std::move(child));
}

nlohmann::json Programs::Result::json() const { return LastLine(out); }

Programs::Result Programs::Execute(const std::vector<std::string>& arguments) {
  while (interrupts_.Next() != 0) {
  }
  const absl::StatusOr<client::Output> output =
      client::RunToEnd(arguments, "", interrupts_, kCommandTimeout);
  if (!output.ok()) {
    ADD_FAILURE() << arguments[0] << " " << arguments[1] << ": " << output.status();
    return {-1, "", ""};
  }
  return {output->exit_code, output->out, output->err};
}

Programs::Result Programs::Lockstep(std::vector<std::string> arguments) {
  if (TakesCoordinator(arguments[0]) && !address_.empty()) {
    arguments.insert(arguments.end(), {"--coordinator", address_});
  }
  arguments.insert(arguments.begin(), absl::StrCat(kBin, "/lockstep"));
  return Execute(arguments);
}

client::Child Programs::Start(const std::vector<std::string>& arguments, const std::string& log) {
  client::SpawnOptions options;
  options.arguments = arguments;
  options.arguments.insert(options.arguments.begin(), absl::StrCat(kBin, "/lockstep"));
  if (TakesCoordinator(arguments[0])) {
    options.arguments.insert(options.arguments.end(), {"--coordinator", address_});
  }
  options.log_path = JoinedPath(log);
  absl::StatusOr<client::Child> child = client::Child::Spawn(options);
  EXPECT_TRUE(child.ok()) << child.status();
  return *std::move(child);
}

nlohmann::json Programs::Job(const std::string& job) {
  nlohmann::json json = Lockstep({"describe", job, "-o", "json"}).json();
  return json.is_object() ? json : nlohmann::json::object();
}

std::string Programs::Submit(const std::string& spec, const std::vector<std::string>& arguments) {
  std::vector<std::string> all = {"submit", spec, "-o", "json"};
  all.insert(all.end(), arguments.begin(), arguments.end());
  const Result result = Lockstep(all);
  EXPECT_EQ(result.code, 0) << result.err;
  const nlohmann::json json = result.json();
  return json.is_object() ? json.value("job", "") : "";
}

nlohmann::json Programs::End(const std::string& job) {
  const Result result = Lockstep({"watch", job, "-o", "json"});
  EXPECT_TRUE(result.json().is_object()) << result.out << result.err;
  return result.json();
}

void Programs::WaitForState(const std::string& job, const std::string& state) {
  std::string last;
  EXPECT_TRUE(Eventually([&] {
    last = Job(job).value("state", "");
    return last == state;
  })) << job
      << " is " << last << ", expected " << state;
}

void Programs::WaitForStep(const std::string& job, int64_t step) {
  nlohmann::json last;
  EXPECT_TRUE(Eventually([&] {
    last = Job(job);
    return last.value("step", int64_t{0}) >= step;
  })) << last;
}

void Programs::WaitForWorkers(int idle) {
  EXPECT_TRUE(Eventually([&] {
    const nlohmann::json workers = Lockstep({"workers", "-o", "json"}).json();
    return workers.is_array() &&
           std::count_if(workers.begin(), workers.end(), [](const nlohmann::json& worker) {
             return worker["state"] == "IDLE";
           }) == idle;
  }));
}

std::vector<std::string> Programs::Survivors() {
  std::vector<std::string> survivors;
  DIR* proc = opendir("/proc");
  for (const dirent* entry = readdir(proc); entry != nullptr; entry = readdir(proc)) {
    const std::string pid = entry->d_name;
    if (pid.find_first_not_of("0123456789") != std::string::npos) continue;
    if (pid == std::to_string(getpid())) continue;
    const std::string environment = Content(absl::StrCat("/proc/", pid, "/environ"));
    if (environment.find(mark_) == std::string::npos) continue;
    std::string command = Content(absl::StrCat("/proc/", pid, "/cmdline"));
    std::replace(command.begin(), command.end(), '\0', ' ');
    if (!command.empty()) survivors.push_back(absl::StrCat(pid, " ", command));  // empty: a zombie
  }
  closedir(proc);
  return survivors;
}

bool Eventually(const std::function<bool()>& question, absl::Duration deadline) {
  const absl::Time end = absl::Now() + deadline;
  while (!question()) {
    if (absl::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(20));
  }
  return true;
}

std::string Content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

int ErrorLines(const std::string& err) {
  int lines = 0;
  size_t begin = 0;
  while (begin < err.size()) {
    size_t end = err.find('\n', begin);
    if (end == std::string::npos) end = err.size();
    const std::string line = err.substr(begin, end - begin);
    lines += line.rfind("lockstep: ", 0) == 0 && line.find("warning") == std::string::npos;
    begin = end + 1;
  }
  return lines;
}

}  // namespace lockstep
