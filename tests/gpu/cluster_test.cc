// The real programs on emulated GPUs: the promise on every placement and through deaths, and what
// people read where a GPU cannot do what it is asked for.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <algorithm>
#include <fstream>
#include <initializer_list>
#include <random>
#include <regex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/cluster/programs.h"
#include "tests/cluster/shell.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;

constexpr char kFaults[] = "LOCKSTEP_EMULATOR_FAULTS";
constexpr char kGpus[] = "LOCKSTEP_EMULATED_GPUS";
constexpr char kTimeout[] = "LOCKSTEP_COLLECTIVE_TIMEOUT";
// Of a member's process: more than the probe and some steps make, far fewer than kManySteps.
constexpr char kLost[] = "lost-at=400";
constexpr char kManySteps[] = "steps: 60, digest_every: 0";

class EmulatedCluster : public ::testing::Test {
 protected:
  void SetUp() override { setenv("LOCKSTEP_CUDA_MODULE", LOCKSTEP_EMULATED_MODULE, 1); }
  void TearDown() override {
    for (const char* name : {"LOCKSTEP_CUDA_MODULE", kFaults, kGpus, kTimeout}) unsetenv(name);
  }

  // 6 steps an epoch, the last of 30 samples: 10 rows a shard, then three shards of 10 and three
  // empty ones.
  std::string Spec(const std::string& name, const std::string& train = "steps: 8") {
    const std::string path = programs_.JoinedPath(name + ".yaml");
    std::ofstream(path) << "name: " << name << R"(
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 330, validation_samples: 103}
model: {preset: mlp, hidden: [16], sync: batch, dropout: 0.2}
optimizer: {type: momentum, learning_rate: 0.05}
checkpoint: {every_steps: 3}
resources: {device: cuda}
train: {batch: 60, shards: 6, evaluate: {batch: 50}, )"
                        << train << "}\n";
    return path;
  }
  // With few parameters and large activations.
  std::string WideSpec() {
    const std::string path = programs_.JoinedPath("wide.yaml");
    std::ofstream(path) << R"(
name: wide
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 8192, validation_samples: 64}
model:
  layers:
    - {type: flatten}
    - {type: dense, units: 8}
    - {type: dense, units: 784}
    - {type: tanh}
    - {type: tanh}
    - {type: dense, units: 10}
optimizer: {type: sgd, learning_rate: 0.05}
checkpoint: {every_epochs: 0}
resources: {device: cuda}
train: {batch: 8192, shards: 8, steps: 1, evaluate: {batch: 64}}
)";
    return path;
  }
  std::string Out(const std::string& name) const { return programs_.JoinedPath(name); }

  Programs::Result Run(const std::string& spec, const std::string& out,
                       const std::vector<std::string>& arguments = {}) {
    std::vector<std::string> all = {"run", spec, "--out", Out(out), "-o", "json"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    return programs_.Lockstep(all);
  }
  nlohmann::json Result(const std::string& spec, const std::string& out,
                        const std::vector<std::string>& arguments = {}) {
    const Programs::Result result = Run(spec, out, arguments);
    EXPECT_EQ(result.code, 0) << result.err;
    return result.json().is_object() ? result.json() : nlohmann::json::object();
  }
  // The one line that a run ends with that fails.
  std::string Failure(const std::string& spec, const std::string& out,
                      const std::vector<std::string>& arguments = {}) {
    const Programs::Result result = Run(spec, out, arguments);
    EXPECT_EQ(result.code, 1) << result.err;
    EXPECT_EQ(ErrorLines(result.err), 1) << result.err;
    const size_t begin = result.err.find("lockstep: ");
    const std::string line = begin == std::string::npos
                                 ? ""
                                 : result.err.substr(begin, result.err.find('\n', begin) - begin);
    std::printf("%s\n", line.c_str());
    return line;
  }
  static void ExpectSameResult(const nlohmann::json& a, const nlohmann::json& b) {
    for (const char* key :
         {"state", "steps", "train", "validation", "parameter_digest", "state_digest"}) {
      EXPECT_EQ(a.value(key, nlohmann::json()), b.value(key, nlohmann::json())) << key;
    }
    EXPECT_EQ(a.value("state", ""), "SUCCEEDED");
  }

  Programs programs_;
};

TEST_F(EmulatedCluster, EveryPlacementGivesTheResultOfOneSlot) {
  const std::string spec = Spec("mlp");
  const nlohmann::json one = Result(spec, "one");
  ExpectSameResult(Result(spec, "slots", {"--slots", "2"}), one);
  // Two that share a GPU, and three that have one each.
  ExpectSameResult(Result(spec, "shared", {"--workers", "2"}), one);
  setenv(kGpus, "3", 1);
  ExpectSameResult(Result(spec, "three", {"--workers", "3"}), one);
  EXPECT_THAT(Content(Out("three") + "/logs/worker-2.log"), HasSubstr("GPU 2: Emulated GPU 2, "));
  // One process that has a GPU for each slot, and one that has more slots than GPUs.
  ExpectSameResult(Result(spec, "process", {"--set", "resources.slots=3"}), one);
  const std::string log = Content(Out("process") + "/logs/worker-0.log");
  for (const char* gpu : {"GPU 0: Emulated", "GPU 1: Emulated", "GPU 2: Emulated"}) {
    EXPECT_THAT(log, HasSubstr(gpu));
  }
  EXPECT_THAT(log, HasSubstr("rank 2 of 3: shards 4 to 5 on 1 slot"));
  setenv(kGpus, "2", 1);
  ExpectSameResult(Result(spec, "streams", {"--slots", "3"}), one);
  EXPECT_THAT(Content(Out("streams") + "/logs/worker-0.log"), HasSubstr("on 2 slots"));
  // From the middle of the epoch.
  ExpectSameResult(
      Result(spec, "resumed",
             {"--workers", "2", "--resume", Out("one") + "/checkpoints/step-00000003"}),
      one);
}

// Also where a short batch has no shards for a member: else each might wait for the other.
TEST_F(EmulatedCluster, MembersComeToCommunicatorsInOneOrder) {
  constexpr char kLog[] = "LOCKSTEP_EMULATED_NCCL_LOG";
  setenv(kGpus, "2", 1);
  setenv(kLog, Out("nccl").c_str(), 1);
  Result(Spec("mlp", "steps: 8"), "two", {"--workers", "2"});
  unsetenv(kLog);
  const std::string log = Content(Out("nccl.0"));
  EXPECT_THAT(log, AllOf(HasSubstr("0\n"), HasSubstr("1\n")));
  EXPECT_EQ(log, Content(Out("nccl.1")));
}

// Microbatches whose gradients are there only when the last pass over them has ended.
TEST_F(EmulatedCluster, AccumulatedMicrobatchesAreExchangedWhenAllAreThere) {
  setenv(kGpus, "3", 1);
  for (const char* sync : {"batch", "shard"}) {
    for (const auto& [accumulate, workers] : {std::pair(2, "3"), std::pair(5, "2")}) {
      const std::string name = absl::StrCat(sync, accumulate);
      SCOPED_TRACE(name);
      const std::string spec = Spec(name, absl::StrCat("steps: 8, accumulate: ", accumulate));
      const std::vector<std::string> one_gpu = {"--set", absl::StrCat("model.sync=", sync)};
      const nlohmann::json one = Result(spec, name + "-one", one_gpu);
      std::vector<std::string> arguments = one_gpu;
      arguments.insert(arguments.end(), {"--workers", workers});
      ExpectSameResult(Result(spec, name + "-several", arguments), one);
    }
  }
}

// A job of layers and options that fit together in some way, by the seed alone.
std::string RandomJob(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](std::initializer_list<const char*> from) {
    return *(from.begin() + random() % from.size());
  };
  std::string layers;
  const auto add = [&](absl::string_view layer) {
    absl::StrAppend(&layers, "    - {type: ", layer, "}\n");
  };
  const auto norm = [&] {
    add(absl::StrCat("batch_norm, sync: ", pick({"batch", "shard"}),
                     pick({"", "", ", statistics: population"})));
  };
  if (random() % 2 == 0) {
    add("flatten");
    if (random() % 3 == 0) norm();
    for (uint64_t left = random() % 3 + 1; left > 0; --left) {
      add(absl::StrCat("dense, units: ", pick({"5", "16", "24"})));
      if (random() % 3 > 0) norm();
      add(pick({"relu", "tanh", "dropout, rate: 0.3", "layer_norm"}));
    }
  } else {
    add(absl::StrCat("conv2d, filters: 4, kernel: 3, stride: 2, padding: 1, bias: ",
                     pick({"true", "false"})));
    if (random() % 4 > 0) norm();
    add("relu");
    add("max_pool, kernel: 2, stride: 2");
    add("conv2d, filters: 6, kernel: 3, padding: 1");
    norm();
    add(pick({"relu", "tanh"}));
    add(pick({"global_average_pool", "flatten"}));
  }
  add("dense, units: 10");
  return absl::StrCat(R"(
data: {path: /usr/share/datasets/fashion-mnist, validation_samples: 103, train_samples: )",
                      pick({"330", "300", "250"}), R"(}
checkpoint: {)",
                      pick({"every_steps: 3", "every_epochs: 0", "every_steps: 5, keep: 2"}), R"(}
resources: {device: cuda}
optimizer: {type: )",
                      pick({"momentum, learning_rate: 0.02", "adam, learning_rate: 0.001",
                            "sgd, learning_rate: 0.02, clip_norm: 0.5"}),
                      R"(}
train: {batch: )",
                      pick({"60", "72"}), ", shards: ", pick({"2", "3", "6", "8"}),
                      ", accumulate: ", pick({"1", "1", "1", "2", "3"}),
                      ", steps: ", pick({"3", "7", "9"}), ", seed: ", seed,
                      ", precision: ", pick({"fp32", "bf16", "tf32"}),
                      ", digest_every: ", pick({"0", "1", "3"}), ", evaluate: {batch: 50",
                      pick({"", ", every_steps: 4", ", every_epochs: 0"}), R"(}}
model:
  layers:
)",
                      layers);
}

// Two of the jobs as if each GPU ran what is ready in an order of its own, one thing at a time: no
// exchange may need another that is not before it.
TEST_F(EmulatedCluster, RandomJobsHaveOneResult) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const std::string name = absl::StrCat("random-", seed), job = RandomJob(seed);
    SCOPED_TRACE(job);
    const std::string spec = programs_.JoinedPath(name + ".yaml");
    std::ofstream(spec) << "name: " << name << job;
    setenv(kGpus, "1", 1);
    const nlohmann::json one = Result(spec, name + "-one");
    if (seed % 2 == 0) ExpectSameResult(Result(spec, name + "-streams", {"--slots", "2"}), one);
    setenv(kGpus, "2", 1);
    if (seed > 4) setenv("LOCKSTEP_EMULATOR_ORDER", absl::StrCat(seed).c_str(), 1);
    if (seed % 2 != 0) {
      ExpectSameResult(Result(spec, name + "-gpus", {"--set", "resources.slots=2"}), one);
    }
    ExpectSameResult(Result(spec, name + "-members", {"--workers", "2"}), one);
    unsetenv("LOCKSTEP_EMULATOR_ORDER");
  }
}

// Libraries on two GPUs of one kind may propose others; the result is that of the first member's,
// or of the run that a checkpoint is of.
TEST_F(EmulatedCluster, AJobKeepsItsAlgorithms) {
  const std::string spec = Spec("mlp", "steps: 8, precision: tf32");  // whose products are theirs
  const std::string in_reverse = absl::StrCat(kFaults, "=sums=reversed");
  const nlohmann::json one = Result(spec, "one");
  setenv(kFaults, "sums=reversed", 1);
  const nlohmann::json reversed = Result(spec, "reversed");
  EXPECT_EQ(reversed["state"], "SUCCEEDED");
  EXPECT_NE(reversed["state_digest"], one["state_digest"]);
  ExpectSameResult(Result(spec, "resumed", {"--resume", Out("one") + "/checkpoints/step-00000003"}),
                   one);
  unsetenv(kFaults);

  setenv(kGpus, "2", 1);
  programs_.StartServer();
  programs_.StartWorker("w0", "cuda:1", {"--gpu", "0"});
  programs_.StartWorker("w1", "cuda:1", {"--gpu", "1"}, {in_reverse});
  programs_.WaitForWorkers(2);
  const std::vector<std::string> both = {"--set", "resources.slots=2", "--out", Out("both")};
  const std::string job = programs_.Submit(spec, both);
  ExpectSameResult(programs_.End(job), one);
  EXPECT_THAT(programs_.Lockstep({"logs", job}).out,
              HasSubstr("worker w1 chose other algorithms than the job has, and is told"));

  // The first member's, where the other cannot follow.
  programs_.worker("w0").Kill();
  programs_.StartWorker("w2", "cuda:1", {"--gpu", "0"},
                        {absl::StrCat(kFaults, "=sums=only-in-order")});
  programs_.WaitForWorkers(2);
  const std::string refused = programs_.Submit(spec, {"--set", "resources.slots=2"});
  const nlohmann::json end = programs_.End(refused);
  EXPECT_EQ(end["state"], "FAILED");
  std::printf("%s\n", end["reason"].get<std::string>().c_str());
  EXPECT_THAT(
      end["reason"].get<std::string>(),
      ContainsRegex("worker w2 \\(slot 0\\) .*this GPU cannot compute a product of .* by the "
                    "job's algorithm, in reverse"));
}

// What is set by hand and cannot be is refused, with what is accepted.
TEST_F(EmulatedCluster, WrongSettingsOfAMachineAreSaidInOneLine) {
  const std::string spec = Spec("mlp");
  const auto failure = [&](const char* name, const char* value) {
    setenv(name, value, 1);
    const std::string line = Failure(spec, absl::StrCat("with-", name));
    unsetenv(name);
    return line;
  };
  EXPECT_THAT(failure("LOCKSTEP_COLLECTIVE", "banana"),
              HasSubstr("banana not in {auto,nccl,host}"));
  EXPECT_THAT(failure("LOCKSTEP_CUDA_EARLY_LAUNCH", "banana"),
              HasSubstr("LOCKSTEP_CUDA_EARLY_LAUNCH is banana; accepted: 0 or 1"));
  EXPECT_THAT(failure("LOCKSTEP_CUDA_LIBS", "/nowhere"),
              HasSubstr("LOCKSTEP_CUDA_LIBS names /nowhere, which is no folder"));
  const Programs::Result both =
      Run(spec, "both", {"--device", "cuda", "--set", "resources.device=cpu"});
  EXPECT_EQ(both.code, 2);
  EXPECT_THAT(both.err, HasSubstr("--device cuda, but --set resources.device=cpu"));

  setenv(kGpus, "2", 1);
  EXPECT_THAT(OutputOf(LOCKSTEP_BIN_DIR "/lockstep-worker --slots cuda:1 --gpu 5 2>&1 || true"),
              HasSubstr("there is no GPU 5; accepted: --gpu 0 to 1"));
  setenv(kGpus, "1", 1);

  Result(spec, "whole");
  const auto evaluation = [&](const char* faults) {
    setenv(kFaults, faults, 1);
    const Programs::Result result = programs_.Lockstep({"evaluate", Out("whole")});
    unsetenv(kFaults);
    EXPECT_EQ(result.code, 1);
    return result.err;
  };
  EXPECT_THAT(evaluation("driver=0"), HasSubstr("there is no NVIDIA driver; install one"));
  EXPECT_THAT(evaluation("driver=12040"),
              HasSubstr("it serves CUDA 12.4, needed is 13.0 or later; update the driver"));
}

// What goes on elsewhere has the bits of the undisturbed run, or says that it has not.
TEST_F(EmulatedCluster, ACheckpointGoesOnOnItsKindOfDevice) {
  const std::string spec = Spec("mlp", "steps: 8");
  const nlohmann::json whole = Result(spec, "whole");
  const std::string from = Out("whole") + "/checkpoints/step-00000003";
  const std::vector<std::string> go_on = {"--resume", from};
  ExpectSameResult(Result(spec, "same", go_on), whole);
  const auto refused = AllOf(HasSubstr(from), HasSubstr("computes otherwise (cuda sm_90"));
  EXPECT_THAT(Failure(spec, "cpu", {"--resume", from, "--set", "resources.device=cpu"}),
              AllOf(refused, HasSubstr("use the same kind of device;")));
  setenv(kFaults, "architecture=8.0", 1);
  EXPECT_THAT(Failure(spec, "older", go_on), AllOf(refused, HasSubstr("train.exact: false")));
  const nlohmann::json inexact =
      Result(spec, "inexact", {"--resume", from, "--set", "train.exact=false"});
  unsetenv(kFaults);
  EXPECT_EQ(inexact["state"], "SUCCEEDED");
  EXPECT_NEAR(inexact["train"]["loss"].get<double>(), whole["train"]["loss"].get<double>(), 1e-4);
}

TEST_F(EmulatedCluster, ALibrarysSumsAreNearTheTrees) {
  const std::string spec = Spec("mlp");
  setenv(kGpus, "3", 1);
  const nlohmann::json exact = Result(spec, "exact", {"--set", "resources.slots=3"});
  const nlohmann::json other =
      Result(spec, "other", {"--set", "resources.slots=3", "--set", "train.exact=false"});
  EXPECT_EQ(other["state"], "SUCCEEDED");
  EXPECT_NE(other["state_digest"], exact["state_digest"]);
  EXPECT_NEAR(other["train"]["loss"].get<double>(), exact["train"]["loss"].get<double>(), 1e-5);
  EXPECT_THAT(Content(Out("other") + "/logs/worker-0.log"), HasSubstr("train.exact is false"));
}

// On every member at the same step, which names the first of them all.
TEST_F(EmulatedCluster, WhatIsNotFiniteHasOneNameOnEveryPlacement) {
  const std::string spec = Spec("mlp", kManySteps);
  const std::vector<std::string> fast = {"--set", "optimizer.learning_rate=1000000"};
  setenv(kGpus, "2", 1);
  std::vector<std::string> found;
  for (const char* slots : {"1", "2"}) {
    std::vector<std::string> arguments = fast;
    arguments.insert(arguments.end(), {"--set", absl::StrCat("resources.slots=", slots)});
    const std::string line = Failure(spec, absl::StrCat("fast", slots), arguments);
    const size_t at = line.find("slot 0: step ");
    found.push_back(at == std::string::npos ? line : line.substr(at, line.find("; the step") - at));
  }
  EXPECT_THAT(found[0], HasSubstr("is not finite; the first tensor that is not finite is "));
  EXPECT_EQ(found[0], found[1]);
}

TEST_F(EmulatedCluster, AStopIsOfOneStepEverywhere) {
  const std::string spec = Spec("mlp", "steps: 100000, digest_every: 0");
  setenv(kGpus, "2", 1);
  programs_.StartServer();
  programs_.StartWorker("w0", "cuda");
  programs_.WaitForWorkers(2);
  const std::string job =
      programs_.Submit(spec, {"--set", "resources.slots=2", "--out", Out("run")});
  programs_.WaitForStep(job, 7);
  EXPECT_EQ(programs_.Lockstep({"cancel", job}).code, 0);
  EXPECT_EQ(programs_.End(job)["state"], "CANCELLED");
}

TEST_F(EmulatedCluster, AKilledWorkerCostsNoBit) {
  const std::string spec = Spec("mlp", kManySteps);
  const nlohmann::json whole = Result(spec, "whole");
  setenv(kGpus, "2", 1);
  programs_.StartServer();
  programs_.StartWorker("w0", "cuda:1", {"--gpu", "0"});
  programs_.StartWorker("w1", "cuda:1", {"--gpu", "1"});
  programs_.WaitForWorkers(2);
  const std::string job =
      programs_.Submit(spec, {"--set", "resources.slots=2", "--out", Out("run")});
  programs_.WaitForStep(job, 7);
  programs_.worker("w1").Signal(SIGKILL);
  const nlohmann::json end = programs_.End(job);
  EXPECT_EQ(end["state"], "FAILED") << "it was over before";
  EXPECT_THAT(end["reason"].get<std::string>(), HasSubstr("worker w1 (slot 0) lost at step "));
  programs_.WaitForWorkers(1);
  const std::string again = programs_.Submit(
      spec, {"--set", "resources.slots=1", "--out", Out("run"), "--resume", Out("run")});
  ExpectSameResult(programs_.End(again), whole);
}

TEST_F(EmulatedCluster, HowLongAnExchangeMayTakeIsTheUsers) {
  setenv(kGpus, "2", 1);
  setenv(kFaults, "nccl=hangs-exchanging", 1);
  setenv(kTimeout, "2", 1);
  const std::string failure = Failure(Spec("mlp"), "run", {"--set", "resources.slots=2"});
  EXPECT_THAT(failure, HasSubstr("the exchange of gradients or moments over NCCL has not ended "
                                 "within 2 s; all members answer; look at the members' GPUs"));
  EXPECT_THAT(failure, HasSubstr("lockstep-worker's --collective-timeout"));
  for (const char* wrong : {"0", "soon", "86401"}) {
    const std::string worker = absl::StrCat(LOCKSTEP_BIN_DIR, "/lockstep-worker");
    const Programs::Result refused = programs_.Execute({worker, "--collective-timeout", wrong});
    EXPECT_EQ(refused.code, 2) << wrong;
    EXPECT_THAT(refused.err, HasSubstr("--collective-timeout")) << wrong;
    setenv(kTimeout, wrong, 1);
    EXPECT_EQ(programs_.Execute({worker}).code, 2) << wrong;
  }
}

// The other leaves the job at once, and serves the next.
TEST_F(EmulatedCluster, AWorkerThatDiesWhileNcclConnectsKeepsNobody) {
  setenv(kGpus, "2", 1);
  programs_.StartServer();
  programs_.StartWorker("w0", "cuda:1", {"--gpu", "0"});
  programs_.StartWorker("w1", "cuda:1", {"--gpu", "1"},
                        {absl::StrCat(kFaults, "=nccl=dies-connecting")});
  programs_.WaitForWorkers(2);
  const std::string spec = Spec("mlp");
  const nlohmann::json end = programs_.End(programs_.Submit(spec, {"--set", "resources.slots=2"}));
  EXPECT_EQ(end["state"], "FAILED");
  EXPECT_THAT(end["reason"].get<std::string>(), HasSubstr("worker w1 (slot 0) lost at step 0"));
  const std::string next = programs_.Submit(spec, {"--set", "resources.slots=1"});
  EXPECT_EQ(programs_.End(next)["state"], "SUCCEEDED");
  EXPECT_THAT(Content(programs_.WorkerLog("w0")), Not(HasSubstr("did not leave")));
}

TEST_F(EmulatedCluster, ShowsItsGpus) {
  setenv(kGpus, "2", 1);
  programs_.StartServer();
  programs_.StartWorker("w0", "cuda:2", {"--gpu", "1"});
  programs_.StartWorker("all", "cuda");
  programs_.WaitForWorkers(3);
  EXPECT_THAT(programs_.Lockstep({"workers"}).out,
              MatchesRegex("(.|\n)*w0 +IDLE +cuda: Emulated GPU 1, 4 GiB +2/2 (.|\n)*"));
  for (const char* one : {"all-gpu0 +IDLE +cuda: Emulated GPU 0, 4 GiB +1/1",
                          "all-gpu1 +IDLE +cuda: Emulated GPU 1, 4 GiB +1/1"}) {
    EXPECT_THAT(programs_.Lockstep({"workers"}).out, ContainsRegex(one));
  }
  const Programs::Result doctor = programs_.Lockstep({"doctor", "--device", "cuda"});
  EXPECT_EQ(doctor.code, 0) << doctor.err;
  EXPECT_THAT(doctor.out, HasSubstr("0  Emulated GPU 0  9.0"));
  EXPECT_THAT(doctor.out, HasSubstr("1  Emulated GPU 1  9.0"));
  EXPECT_THAT(doctor.out, HasSubstr("serves CUDA 13.0"));
  EXPECT_THAT(doctor.out, HasSubstr("lockstep run deploy/jobs/mlp.yaml --device cuda"));
}

TEST_F(EmulatedCluster, ShowsHowBusyItsGpusAre) {
  const char* const before = getenv("LD_LIBRARY_PATH");
  const std::string old = before == nullptr ? "" : before;
  setenv("LD_LIBRARY_PATH", absl::StrCat(LOCKSTEP_EMULATED_NVML, ":", old).c_str(), 1);
  programs_.StartServer();
  programs_.StartWorker("w0", "cuda:1");
  before == nullptr ? unsetenv("LD_LIBRARY_PATH") : setenv("LD_LIBRARY_PATH", old.c_str(), 1);
  programs_.WaitForWorkers(1);
  const std::string shown = "cuda: Emulated GPU, 4 GiB, 5 used, 37% busy";
  std::string out;
  for (int i = 0; i < 100 && out.find(shown) == std::string::npos; ++i) {
    absl::SleepFor(absl::Milliseconds(100));
    out = programs_.Lockstep({"workers"}).out;
  }
  EXPECT_THAT(out, HasSubstr(shown));
}

TEST_F(EmulatedCluster, AJobForGpusWaitsWhereThereAreNone) {
  programs_.StartServer();
  programs_.StartWorker("w0", 2);
  programs_.WaitForWorkers(1);
  const std::string job = programs_.Submit(Spec("mlp"));
  const std::string reason = "waits for a worker of device cuda: none is connected; start one: ";
  EXPECT_EQ(programs_.Job(job)["state"], "QUEUED");
  EXPECT_THAT(programs_.Job(job)["reason"].get<std::string>(), HasSubstr(reason));
  EXPECT_THAT(programs_.Lockstep({"describe", job}).out, HasSubstr(reason));
  EXPECT_THAT(programs_.Lockstep({"jobs"}).out, HasSubstr("waits for a worker of device cuda"));
  programs_.StartWorker("w1", "cuda:1");
  EXPECT_EQ(programs_.End(job)["state"], "SUCCEEDED");
}

TEST_F(EmulatedCluster, ADriverThatIsTooOld) {
  setenv(kFaults, "driver=12040", 1);
  EXPECT_THAT(
      Failure(Spec("mlp"), "run"),
      HasSubstr("the driver is too old: it serves CUDA 12.4, needed is 13.0 or later; update "
                "the driver"));
  const Programs::Result doctor = programs_.Lockstep({"doctor", "--device", "cuda"});
  EXPECT_EQ(doctor.code, 1);
  EXPECT_EQ(std::count(doctor.err.begin(), doctor.err.end(), '\n'), 1) << doctor.err;
  EXPECT_THAT(doctor.err, HasSubstr("the NVIDIA driver is too old: it serves CUDA 12.4, needed is "
                                    "13.0; update it to driver 580 or later"));
  std::printf("%s", doctor.err.c_str());
}

TEST_F(EmulatedCluster, AGpuThatIsTooOld) {
  setenv(kFaults, "architecture=7.0", 1);
  const std::string problem =
      "GPU 0 (Emulated GPU) has compute capability 7.0; needed: 8.0 (Ampere) or later; use another "
      "GPU, or the CPU";
  EXPECT_THAT(Failure(Spec("mlp"), "run"), HasSubstr(problem));
  const Programs::Result doctor = programs_.Lockstep({"doctor", "--device", "cuda"});
  EXPECT_EQ(doctor.code, 1);
  EXPECT_EQ(std::count(doctor.err.begin(), doctor.err.end(), '\n'), 1) << doctor.err;
  EXPECT_THAT(doctor.err, HasSubstr(problem));
  std::printf("%s", doctor.err.c_str());
}

// In mid-run, to a worker of two; that worker begins anew, and serves what comes next.
TEST_F(EmulatedCluster, ALostGpuIsNamedAndItsWorkerBeginsAnew) {
  const std::string spec = Spec("mlp", kManySteps);
  const nlohmann::json whole = Result(spec, "whole");
  setenv(kGpus, "2", 1);
  programs_.StartServer();
  programs_.StartWorker("w0", "cuda:1", {"--gpu", "0"});
  programs_.StartWorker("w1", "cuda:1", {"--gpu", "1"},
                        {absl::StrCat(kFaults, "=", kLost, " error=cudaErrorECCUncorrectable")});
  programs_.WaitForWorkers(2);
  const auto incarnation = [&] {
    for (const nlohmann::json& worker : programs_.Lockstep({"workers", "-o", "json"}).json()) {
      if (worker["name"] == "w1") return worker["incarnation"].dump();
    }
    return std::string();
  };
  const std::string before = incarnation();
  const std::string slots = "resources.slots=2";
  const std::string job = programs_.Submit(spec, {"--set", slots, "--out", Out("run")});
  // What waits for slots is not given to a worker that is about to end.
  const std::string next = programs_.Submit(spec, {"--set", slots, "--set", "train.steps=1"});
  const nlohmann::json end = programs_.End(job);
  EXPECT_EQ(end["state"], "FAILED");
  const std::string reason = end["reason"];
  std::printf("%s\n", reason.c_str());
  EXPECT_THAT(
      reason,
      MatchesRegex("worker w1 \\(slot 0\\) failed at step [0-9]+: GPU 1 \\(Emulated GPU 1\\) "
                   "is lost: uncorrectable ECC error encountered "
                   "\\(cudaErrorECCUncorrectable\\); nvidia-smi and the kernel's log .*"));
  EXPECT_EQ(programs_.End(next)["state"], "SUCCEEDED");
  EXPECT_NE(incarnation(), before);
  EXPECT_FALSE(programs_.worker("w1").Ended());
  EXPECT_THAT(Content(programs_.WorkerLog("w1")),
              HasSubstr("GPU 1 (Emulated GPU 1) is lost: uncorrectable ECC error encountered "
                        "(cudaErrorECCUncorrectable)"));
  EXPECT_THAT(Content(programs_.WorkerLog("w1")), HasSubstr("; this worker begins anew"));
  // Its next life has the fault too.
  programs_.worker("w1").Kill();
  programs_.WaitForWorkers(1);
  const std::string again = programs_.Submit(
      spec, {"--set", "resources.slots=1", "--out", Out("run"), "--resume", Out("run")});
  ExpectSameResult(programs_.End(again), whole);
}

// Jobs on the other GPUs of a process end with it, and say why.
TEST_F(EmulatedCluster, ALostGpuIsNamedToTheJobsOfTheOthers) {
  const std::string spec = Spec("mlp", "steps: 100000, digest_every: 0");
  setenv(kGpus, "2", 1);
  programs_.StartServer();
  programs_.StartWorker("all", "cuda", {}, {absl::StrCat(kFaults, "=", kLost, " gpu=1")});
  programs_.WaitForWorkers(2);
  const std::vector<std::string> one_slot = {"--set", "resources.slots=1"};
  const std::string unhurt = programs_.Submit(spec, one_slot);
  programs_.WaitForStep(unhurt, 7);
  const std::string hurt = programs_.Submit(spec, one_slot);
  constexpr char kWhy[] =
      "GPU 1 \\(Emulated GPU 1\\) is lost: an illegal memory access was encountered .*";
  EXPECT_THAT(
      programs_.End(hurt)["reason"].get<std::string>(),
      MatchesRegex(absl::StrCat("worker all-gpu1 \\(slot 0\\) failed at step [0-9]+: ", kWhy)));
  const std::string reason = programs_.End(unhurt)["reason"];
  std::printf("%s\n", reason.c_str());
  EXPECT_THAT(reason, MatchesRegex(absl::StrCat("worker all-gpu0 \\(slot 0\\) lost at step [0-9]+: "
                                                "its process ends: ",
                                                kWhy)));
  programs_.WaitForWorkers(2);
}

TEST_F(EmulatedCluster, ALostGpuIsOneLineOfARun) {
  setenv(kFaults, kLost, 1);
  EXPECT_THAT(Failure(Spec("mlp", kManySteps), "run"),
              AllOf(HasSubstr("worker worker-0 (slot 0) failed at step "),
                    HasSubstr(": GPU 0 (Emulated GPU) is lost: an illegal memory access was "
                              "encountered (cudaErrorIllegalAddress); nvidia-smi and")));
}

// What the message advises is followed, each advice by itself; also where little fits.
TEST_F(EmulatedCluster, TooLittleMemoryIsRefusedWithAdviceThatHolds) {
  const std::string spec = WideSpec();
  for (const auto& [memory, shown, advices] :
       {std::tuple("230000000", "219.3", 3), std::tuple("175000000", "166.9", 2)}) {
    SCOPED_TRACE(memory);
    setenv(kFaults, absl::StrCat("memory=", memory).c_str(), 1);
    const std::string failure = Failure(spec, memory);
    EXPECT_THAT(failure, HasSubstr("GPU 0 (Emulated GPU) has not enough memory: this needs "));
    EXPECT_THAT(failure, HasSubstr("the plan of slot 0: activations of 8 shards (8192 samples at "
                                   "once) "));
    EXPECT_THAT(failure, HasSubstr(absl::StrCat(" of ", shown, " MiB are free; ")));
    int followed = 0;
    std::smatch advice;
    for (const char* field : {"train.batch", "train.accumulate"}) {
      const std::regex regex(absl::StrCat("(", field, "=[0-9]+) \\(now "));
      if (!std::regex_search(failure, advice, regex)) continue;
      ++followed;
      EXPECT_EQ(Result(spec, absl::StrCat(field, memory), {"--set", advice[1]})["state"],
                "SUCCEEDED");
    }
    if (std::regex_search(failure, advice, std::regex("([0-9]+) workers with a GPU each"))) {
      ++followed;
      setenv(kGpus, advice[1].str().c_str(), 1);
      EXPECT_EQ(Result(spec, absl::StrCat("workers", memory), {"--workers", advice[1]})["state"],
                "SUCCEEDED");
      unsetenv(kGpus);
    }
    EXPECT_EQ(followed, advices);
  }
}

// Also where nothing can be made at all.
TEST_F(EmulatedCluster, AGpuWithoutMemorySaysWhatTheJobNeeds) {
  setenv(kFaults, "memory=1000000", 1);
  EXPECT_THAT(
      Failure(Spec("mlp"), "run"),
      ContainsRegex("GPU 0 \\(Emulated GPU\\) has not enough memory: this needs [0-9.]+ MiB, "
                    "1.0 MiB of 1.0 MiB are free; "));
}

TEST_F(EmulatedCluster, WhatIsExplainedIsWhatARefusalSays) {
  const std::string spec = Spec("mlp");
  const Programs::Result explained = programs_.Lockstep({"explain", spec});
  std::smatch total;
  ASSERT_TRUE(std::regex_search(explained.out, total, std::regex("\n  total +([0-9.]+ MiB)\n")))
      << explained.out << explained.err;
  setenv(kFaults, "memory=1000000", 1);
  EXPECT_THAT(Failure(spec, "run"), HasSubstr(absl::StrCat("this needs ", total[1].str(), ", ")));
}

// As much as is said to be missing is enough.
TEST_F(EmulatedCluster, TooLittleMemoryIsNoMoreThanWhatIsMissing) {
  const std::string spec = WideSpec();
  constexpr double kMemory = 180'000'000, kMib = 1 << 20;
  setenv(kFaults, absl::StrCat("memory=", static_cast<int64_t>(kMemory)).c_str(), 1);
  const std::string failure = Failure(spec, "less", {"--slots", "2"});
  std::smatch sizes;
  ASSERT_TRUE(
      std::regex_search(failure, sizes, std::regex("needs ([0-9.]+) MiB, ([0-9.]+) MiB of")));
  const double missing = std::stod(sizes[1]) - std::stod(sizes[2]) + 0.2;  // they are rounded
  setenv(kFaults, absl::StrCat("memory=", static_cast<int64_t>(kMemory + kMib * missing)).c_str(),
         1);
  EXPECT_EQ(Result(spec, "enough", {"--slots", "2"})["state"], "SUCCEEDED");
}

// What else is on the GPU may take it meanwhile.
TEST_F(EmulatedCluster, AnAllocationThatFailsSaysWhatItWasFor) {
  setenv(kFaults, "allocation=5", 1);
  EXPECT_THAT(
      Failure(Spec("mlp"), "run"),
      ContainsRegex("no memory for the plan of slot 0: CUDA: allocating [0-9]+ bytes on GPU "
                    "0 \\(Emulated GPU\\), of which [0-9]+ of 4294967296 are free "
                    "\\(nvidia-smi shows who has the rest\\): out of memory"));
  setenv(kFaults, "allocation=1", 1);
  EXPECT_THAT(
      Failure(Spec("mlp"), "stream"),
      ContainsRegex("no memory for a stream: CUDA: making a stream with [0-9]+ bytes on GPU "
                    "0, of which [0-9]+ of 4294967296 are free "
                    "\\(nvidia-smi shows who has the rest\\): out of memory"));
}

// A data set is copied to the GPU only where everything else has room beside it.
TEST_F(EmulatedCluster, ADataSetDoesNotTakeTheRoomOfTheRest) {
  setenv(kFaults, "memory=200000000", 1);
  const std::string spec = Spec("mlp", "steps: 20");
  const std::vector<std::string> large = {"--set", "data.train_samples=60000"};
  const nlohmann::json staged = Result(spec, "staged", large);
  unsetenv(kFaults);
  ExpectSameResult(staged, Result(spec, "resident", large));
}

}  // namespace
}  // namespace lockstep
