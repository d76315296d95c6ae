// lockstep-worker: joins the agent (the stream to the coordinator) and train (what jobs do).
#include <arpa/inet.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "common/host.h"
#include "common/status_macros.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"
#include "worker/agent/agent.h"
#include "worker/device/module/cuda_module.h"
#include "worker/machine/gpu_usage.h"
#include "worker/machine/machine.h"
#include "worker/train/member_job.h"
#include "worker/train/offline.h"

namespace {

using lockstep::agent::Agent;

struct Flags {
  std::string coordinator = "127.0.0.1:7070";
  std::string slots = absl::StrCat("cpu:", lockstep::AvailableCores());
  std::string name = lockstep::HostName();
  std::string host_id = lockstep::DefaultHostId();
  std::string advertise;
  std::string work_dir = "lockstep-worker";
  std::string data;
  std::string evaluate;
  std::string log_level = "info";
  std::string collective = "auto";
  int collective_timeout = 600;  // seconds
  int64_t flip_bit_at_step = 0;
  int gpu = -1;  // all
  bool gpu_in_turn = false;
  bool insecure = false;
  bool explain = false;
  bool probe = false;
  bool die_with_parent = false;
};

lockstep::train::GradientPath PathOf(const std::string& collective) {
  using lockstep::train::GradientPath;
  if (collective == "auto") return GradientPath::kAutomatic;
  return collective == "nccl" ? GradientPath::kNccl : GradientPath::kHost;
}

// "cpu:4" -> 4 slots of device cpu; "cuda" -> kEveryGpu. 0: malformed.
constexpr int kEveryGpu = -1;
int ParseSlots(const std::string& text, std::string* device) {
  absl::string_view count = text;
  int slots = 0;
  if (text == "cuda") {
    *device = text;
    return kEveryGpu;
  }
  for (const char* kind : {"cpu", "cuda"}) {
    if (!absl::ConsumePrefix(&count, absl::StrCat(kind, ":"))) continue;
    *device = kind;
    return absl::SimpleAtoi(count, &slots) && slots >= 1 && slots <= 1024 ? slots : 0;
  }
  return 0;
}

// What one agent offers: slots of a GPU, where it has one.
struct Share {
  int slots = 0;
  std::optional<lockstep::device::GpuInfo> gpu;
};

// `slots` spread over GPU `wanted`, or over all that can be used: one each, or where there are
// fewer GPUs, streams of them. `in_turn`: behind the last GPU comes the first again.
absl::StatusOr<std::vector<Share>> ShareGpus(int wanted, bool in_turn, int slots) {
  ASSIGN_OR_RETURN(const lockstep::device::CudaModule* module, lockstep::device::LoadCudaModule());
  const lockstep::device::CudaReport report = module->report();
  if (report.gpus.empty()) return absl::FailedPreconditionError(report.problem);
  std::vector<lockstep::device::GpuInfo> gpus;
  const int count = static_cast<int>(report.gpus.size());
  if (wanted >= count && !in_turn) {
    return absl::InvalidArgumentError(
        absl::StrCat("there is no GPU ", wanted, "; accepted: --gpu 0 to ", count - 1));
  }
  if (wanted >= 0) {
    if (wanted >= count) {
      spdlog::warn("there is no GPU {}; this worker shares GPU {} with another", wanted,
                   wanted % count);
    }
    gpus = {report.gpus[wanted % count]};
  } else {
    for (const lockstep::device::GpuInfo& gpu : report.gpus) {
      if (gpu.cannot_use.empty()) {
        gpus.push_back(gpu);
      } else {
        spdlog::warn("GPU {} is not used: {}", gpu.ordinal, gpu.cannot_use);
      }
    }
    if (gpus.empty()) gpus = {report.gpus.front()};
  }
  if (!gpus.front().cannot_use.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat(gpus.front().cannot_use,
                     "; use another GPU, or the CPU (here --slots cpu:1, for a job --device cpu)"));
  }
  if (slots == kEveryGpu) slots = static_cast<int>(gpus.size());
  const int shares = std::min(slots, static_cast<int>(gpus.size()));
  std::vector<Share> all;
  for (int i = 0; i < shares; ++i) {
    all.push_back({slots * (i + 1) / shares - slots * i / shares, gpus[i]});
    spdlog::info("GPU {}: {}, {} of {} MiB free", gpus[i].ordinal, gpus[i].name,
                 gpus[i].free_bytes >> 20, gpus[i].memory_bytes >> 20);
  }
  return all;
}

// One generation of a job as the agent sees it, on MemberJob.
class TrainJob : public lockstep::agent::Job {
 public:
  explicit TrainJob(lockstep::train::MemberOptions options) : job_(std::move(options)) {}
  absl::StatusOr<lockstep::v1::Ready> Prepare() override { return job_.Prepare(); }
  absl::StatusOr<lockstep::v1::Ready> UseAlgorithms(
      const lockstep::v1::Algorithms& algorithms) override {
    return job_.UseAlgorithms(algorithms);
  }
  lockstep::v1::Ended Run(const lockstep::v1::Start& start) override { return job_.Run(start); }
  void Stop() override { job_.Stop(); }
  void Abort(const std::string& reason) override { job_.Abort(reason); }
  absl::Status broken() const override { return job_.broken(); }

 private:
  lockstep::train::MemberJob job_;
};

// A process whose GPU is lost to it gets it back, if at all, by beginning anew: as itself, so that
// whoever started it still has it. Where the GPU stays lost, the new beginning says so and ends.
[[noreturn]] void BeginAnew(char** arguments, const absl::Status& why) {
  spdlog::error("{}; this worker begins anew", std::string(why.message()));
  std::cout.flush();
  // Of what it held open nothing is of use any more.
  close_range(STDERR_FILENO + 1, ~0U, CLOSE_RANGE_CLOEXEC);
  execv("/proc/self/exe", arguments);
  std::cerr << "lockstep-worker: " << why.message() << std::endl;
  _exit(1);
}

lockstep::agent::AgentOptions OptionsOf(const Flags& flags, const std::string& device,
                                        const Share& share) {
  lockstep::agent::AgentOptions options;
  options.coordinator = flags.coordinator;
  options.insecure = flags.insecure;
  options.name = flags.name;
  options.host = lockstep::HostName();
  options.host_id = flags.host_id;
  options.advertise = flags.advertise;
  options.slots = share.slots;
  options.device = device;
  if (share.gpu.has_value()) {
    options.gpu.emplace();
    options.gpu->set_name(share.gpu->name);
    options.gpu->set_memory_bytes(share.gpu->memory_bytes);
    options.gpu->set_ordinal(share.gpu->ordinal);
    options.gpu->set_uuid(share.gpu->uuid);
    options.gpu_usage = [uuid = share.gpu->uuid]() -> std::optional<lockstep::v1::GpuUsage> {
      const auto usage = lockstep::machine::ReadGpuUsage(uuid);
      if (!usage.has_value()) return std::nullopt;
      lockstep::v1::GpuUsage told;
      told.set_busy_percent(usage->busy_percent);
      told.set_used_bytes(usage->used_bytes);
      return told;
    };
  }
  options.version = LOCKSTEP_VERSION;
  return options;
}

// One process for a machine: a GPU is an address space of its own, so each has an agent, which the
// coordinator takes for a worker. Agents end together.
int Serve(const Flags& flags, char** arguments, const std::string& device,
          const std::vector<Share>& shares) {
  // Signals are taken by a thread of their own, so that handlers may lock.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);

  const auto factory_of = [&](const Share& share) {
    return [&flags, gpu = share.gpu.has_value() ? share.gpu->ordinal : 0](
               const lockstep::v1::Prepare& prepare, lockstep::agent::Outbox& outbox) {
      lockstep::train::MemberOptions member;
      member.prepare = prepare;
      member.host = lockstep::HostName();
      member.address = prepare.members(prepare.rank()).address();
      // Checkpoints are named to people on other hosts: by absolute paths.
      member.work_dir = std::filesystem::absolute(flags.work_dir);
      member.version = LOCKSTEP_VERSION;
      member.data_path = flags.data;
      member.gpu = gpu;
      member.gradients = PathOf(flags.collective);
      member.collective_timeout = absl::Seconds(flags.collective_timeout);
      member.flip_bit_at_step = flags.flip_bit_at_step;
      member.send = [&outbox](lockstep::v1::WorkerMessage message) {
        outbox.Send(std::move(message));
      };
      return std::make_unique<TrainJob>(std::move(member));
    };
  };
  std::vector<std::unique_ptr<Agent>> agents;
  for (const Share& share : shares) {
    lockstep::agent::AgentOptions options = OptionsOf(flags, device, share);
    if (shares.size() > 1) absl::StrAppend(&options.name, "-gpu", share.gpu->ordinal);
    agents.push_back(std::make_unique<Agent>(std::move(options), factory_of(share)));
  }
  const auto shut_down = [&agents] {
    for (const auto& agent : agents) agent->Shutdown();
  };
  std::thread([&shut_down, signals] {
    int signal = 0;
    sigwait(&signals, &signal);
    spdlog::info("stopping on signal {}", signal);
    shut_down();
    // A second signal, or a job that does not let go, ends the process all the same.
    timespec patience{.tv_sec = 3, .tv_nsec = 0};
    sigtimedwait(&signals, nullptr, &patience);
    _exit(1);
  }).detach();
  absl::Mutex mutex;
  absl::Status first;  // that an agent ended with
  const auto run = [&](Agent& agent) {
    const absl::Status status = agent.Run();
    if (status.ok()) return;
    {
      absl::MutexLock lock(&mutex);
      if (!first.ok()) return;  // who was first ends the others
      first = status;
    }
    if (!absl::IsAborted(status)) return shut_down();
    // The jobs of the other GPUs end with the process, for this reason.
    std::vector<std::thread> leaving;
    for (const auto& other : agents) {
      if (other.get() != &agent) leaving.emplace_back([&] { other->Leave(status); });
    }
    for (std::thread& thread : leaving) thread.join();
    BeginAnew(arguments, status);
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < agents.size(); ++i) {
    threads.emplace_back([&run, agent = agents[i].get()] { run(*agent); });
  }
  run(*agents.front());
  for (std::thread& thread : threads) thread.join();
  if (!first.ok()) {
    std::cerr << "lockstep-worker: " << first.message() << std::endl;
    _exit(1);
  }
  std::cout.flush();
  _exit(0);  // the signal thread is still waiting
}

}  // namespace

int main(int argc, char** argv) {
  Flags flags;
  CLI::App app("A Lockstep worker: offers this machine's slots to a coordinator.",
               "lockstep-worker");
  app.footer("Example: lockstep-worker --coordinator 10.0.0.1:7070 --slots cpu:2 --insecure");
  app.set_version_flag("--version", LOCKSTEP_VERSION);
  app.add_option("--coordinator", flags.coordinator, "host:port of lockstep-server")
      ->capture_default_str();
  app.add_option("--slots", flags.slots,
                 "what to offer: cpu:N, N slots of one thread each; cuda, a slot on every GPU; "
                 "cuda:N, N slots spread over the GPUs")
      ->capture_default_str();
  app.add_option("--gpu", flags.gpu, "the only GPU to use (default: all)")
      ->check(CLI::Range(0, 1023));
  app.add_flag(
      "--gpu-in-turn", flags.gpu_in_turn,
      "--gpu counts on behind the last GPU from the first: of several workers on a machine");
  app.add_option("--name", flags.name, "unique among the workers of a coordinator")
      ->capture_default_str();
  app.add_option("--host-id", flags.host_id,
                 "equal for workers that can share memory; others exchange over the network")
      ->capture_default_str();
  app.add_option(
      "--advertise", flags.advertise,
      "IP address that workers on other hosts reach this one by (default: the local address of "
      "the connection to the coordinator)");
  app.add_option("--work-dir", flags.work_dir, "where jobs without an output folder write")
      ->capture_default_str();
  app.add_option("--data", flags.data, "folder of the data, in place of the spec's data.path");
  app.add_option(
         "--collective", flags.collective,
         "how GPUs exchange gradients: nccl; host, through the machines' memory; auto, over "
         "NCCL where no two workers share a GPU")
      ->check(CLI::IsMember({"auto", "nccl", "host"}))
      ->envname("LOCKSTEP_COLLECTIVE")
      ->capture_default_str();
  app.add_option("--collective-timeout", flags.collective_timeout,
                 "seconds that a worker waits in an exchange for the others of a job, which then "
                 "fails")
      ->check(CLI::Range(1, 86400))
      ->envname("LOCKSTEP_COLLECTIVE_TIMEOUT")
      ->capture_default_str();
  app.add_flag("--insecure", flags.insecure,
               "allow a coordinator that is not on loopback, without encryption");
  app.add_option("--log-level", flags.log_level, "debug, info, warning or error")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->capture_default_str();
  app.add_option("--evaluate", flags.evaluate,
                 "score the newest checkpoint in this folder, print JSON, exit");
  app.add_flag("--explain", flags.explain,
               "read a spec on standard input, print its plan as JSON, exit");
  app.add_flag("--probe", flags.probe,
               "print what this machine can compute on as JSON, exit (lockstep doctor shows it)");
  app.add_flag("--die-with-parent", flags.die_with_parent,
               "end when the process that started this one ends");
  app.add_option("--flip-bit-at-step", flags.flip_bit_at_step,
                 "fault injection: corrupt one bit of this replica after the step")
      ->group("Testing");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // help, or the version
    std::cerr << "lockstep-worker: " << error.what() << "; see lockstep-worker --help\n";
    return 2;
  }
  if (flags.die_with_parent) {
    const pid_t parent = getppid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) return 1;
  }
  spdlog::set_default_logger(spdlog::stderr_logger_mt("lockstep-worker"));
  spdlog::set_pattern("%Y-%m-%dT%H:%M:%S.%e %L %v");
  spdlog::set_level(spdlog::level::from_str(flags.log_level));

  if (flags.probe) {
    // Names of files and devices may hold bytes that are no UTF-8.
    std::cout << lockstep::machine::MachineJson(lockstep::machine::LookAtMachine())
                     .dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace)
              << std::endl;
    return 0;
  }
  if (flags.explain || !flags.evaluate.empty()) {
    absl::StatusOr<std::string> json;
    if (flags.explain) {
      const std::string spec{std::istreambuf_iterator<char>(std::cin),
                             std::istreambuf_iterator<char>()};
      json = lockstep::train::ExplainSpec(spec);
    } else {
      json = lockstep::train::EvaluateCheckpoint(flags.evaluate, flags.data,
                                                 lockstep::AvailableCores());
    }
    if (!json.ok()) {
      std::cerr << "lockstep-worker: " << json.status().message() << std::endl;
      return absl::IsInvalidArgument(json.status()) ? 2 : 1;
    }
    std::cout << *json << std::endl;
    return 0;
  }
  std::string device;
  const int slots = ParseSlots(flags.slots, &device);
  if (slots == 0) {
    std::cerr << "lockstep-worker: --slots " << flags.slots
              << ": accepted: cuda, and cpu:N or cuda:N with N from 1 to 1024" << std::endl;
    return 2;
  }
  unsigned char address[sizeof(in6_addr)];
  if (!flags.advertise.empty() && inet_pton(AF_INET, flags.advertise.c_str(), address) != 1 &&
      inet_pton(AF_INET6, flags.advertise.c_str(), address) != 1) {
    std::cerr << "lockstep-worker: --advertise " << flags.advertise
              << ": accepted: an IP address such as 10.0.0.2 (no name, no port)" << std::endl;
    return 2;
  }
  std::vector<Share> shares = {{slots, std::nullopt}};
  if (device == "cuda") {
    absl::StatusOr<std::vector<Share>> shared = ShareGpus(flags.gpu, flags.gpu_in_turn, slots);
    if (!shared.ok()) {
      std::cerr << "lockstep-worker: --slots " << flags.slots << ": " << shared.status().message()
                << std::endl;
      return 1;
    }
    shares = *std::move(shared);
  }
  return Serve(flags, argv, device, shares);
}
