// What the worker says of machines that the tests do not have, and of this one.
#include "worker/machine/machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>

#include "common/host.h"
#include "tests/common/temporary_folder.h"

namespace lockstep::machine {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// With one H200 that can be used.
MachineFacts GoodGpu() {
  MachineFacts facts;
  facts.cpu = {"AMD EPYC", 2, uint64_t{16} << 30, "cpu avx512 onednn 2.7.3", ""};
  facts.driver = {"13.0", "580.65.06", 1};
  facts.module.path = "/opt/lockstep/liblockstep_cuda.so";
  facts.module.search = {{"/opt/libs"}, {{"libcudnn.so.9", "/opt/libs/libcudnn.so.9"}}};
  facts.module.report = {"13.0", "13.0", "cublaslt 13.1.0", "cudnn 9.12.0", "", {}, ""};
  device::GpuInfo gpu;
  gpu.name = "NVIDIA H200";
  gpu.major = 9;
  gpu.multiprocessors = 132;
  gpu.memory_bytes = uint64_t{140} << 30;
  gpu.free_bytes = uint64_t{139} << 30;
  facts.module.report.gpus.push_back(gpu);
  return facts;
}

MachineFacts NoModuleOr(absl::Status status) {
  MachineFacts facts = GoodGpu();
  facts.module = {};
  facts.module.status = std::move(status);
  return facts;
}

// The only problem.
nlohmann::ordered_json Problem(const MachineFacts& facts) {
  const nlohmann::ordered_json problems = MachineJson(facts)["cuda"]["problems"];
  EXPECT_EQ(problems.size(), 1u) << problems;
  return problems.empty() ? nlohmann::ordered_json{{"problem", ""}, {"advice", ""}} : problems[0];
}

TEST(MachineJson, OfAGoodGpu) {
  const nlohmann::ordered_json json = MachineJson(GoodGpu());
  EXPECT_EQ(json["cpu"]["instruction_set"], "avx512");
  EXPECT_EQ(json["cpu"]["cannot_use"], "");
  const nlohmann::ordered_json& cuda = json["cuda"];
  EXPECT_EQ(cuda["module"], "/opt/lockstep/liblockstep_cuda.so");
  EXPECT_EQ(cuda["libraries"][0]["path"], "/opt/libs/libcudnn.so.9");
  EXPECT_EQ(cuda["gpus"][0]["compute_capability"], "9.0");
  EXPECT_EQ(cuda["gpus"][0]["memory_bytes"], uint64_t{140} << 30);
  EXPECT_TRUE(cuda["gpus"][0]["peers"].is_array());
  EXPECT_EQ(cuda["problems"].size(), 0u);
}

TEST(MachineJson, OfAMachineWithoutDriver) {
  MachineFacts facts = GoodGpu();
  facts.module.report.gpus.clear();
  facts.driver = {"", "", 0};
  EXPECT_THAT(Problem(facts)["problem"], StartsWith("there is no NVIDIA driver, and the PCI bus"));
  EXPECT_THAT(Problem(facts)["advice"], StartsWith("use a machine that has one"));
  facts.driver.pci_gpus = 2;
  EXPECT_THAT(Problem(facts)["problem"], HasSubstr("the PCI bus has 2 GPUs of NVIDIA"));
  EXPECT_THAT(Problem(facts)["advice"], HasSubstr("install driver 580 or later"));
  facts.driver.kernel_module = "580.65.06";  // as in a container
  EXPECT_THAT(Problem(facts)["problem"], HasSubstr("libcuda.so.1 is not found"));
  EXPECT_THAT(Problem(facts)["advice"], HasSubstr("docker run --gpus all"));
}

TEST(MachineJson, OfADriverThatShowsNoGpu) {
  MachineFacts facts = GoodGpu();
  facts.module.report.gpus.clear();
  facts.driver.cuda = facts.module.report.driver = "12.2";
  EXPECT_EQ(Problem(facts)["problem"],
            "the NVIDIA driver is too old: it serves CUDA 12.2, needed is 13.0");
  EXPECT_THAT(Problem(facts)["advice"], HasSubstr("update it to driver 580 or later"));
  facts.driver.cuda = "13.1";
  facts.module.report.problem = "CUDA: looking for GPUs: no CUDA-capable device is detected";
  EXPECT_EQ(Problem(facts)["problem"], facts.module.report.problem);
  EXPECT_THAT(Problem(facts)["advice"], HasSubstr("CUDA_VISIBLE_DEVICES"));
  facts.driver.kernel_module = "";
  EXPECT_THAT(Problem(facts)["advice"], HasSubstr("modprobe nvidia"));
}

TEST(MachineJson, OfAGpuThatCannotBeUsed) {
  MachineFacts facts = GoodGpu();
  facts.module.report.gpus[0].cannot_use =
      "GPU 0 (Tesla V100) has compute capability 7.0; needed: 8.0 (Ampere) or later";
  EXPECT_EQ(Problem(facts)["problem"], facts.module.report.gpus[0].cannot_use);
  EXPECT_THAT(Problem(facts)["advice"], StartsWith("use another GPU, or the CPU"));
  facts.module.report.gpus[0].cannot_use = "CUDA: out of memory";
  EXPECT_EQ(Problem(facts)["problem"], "GPU 0: CUDA: out of memory");
}

TEST(MachineJson, OfWhatIsNotInstalled) {
  const auto no_module = Problem(NoModuleOr(absl::NotFoundError("no module")));
  EXPECT_THAT(no_module["advice"], HasSubstr("LOCKSTEP_CUDA=ON"));
  EXPECT_THAT(no_module["advice"], HasSubstr("LOCKSTEP_CUDA_MODULE"));
  const auto other = Problem(NoModuleOr(
      absl::FailedPreconditionError("/m.so is of another build (1; 2); install both from one")));
  EXPECT_EQ(other["problem"], "/m.so is of another build (1; 2)");
  EXPECT_THAT(other["advice"], HasSubstr("of one build"));

  MachineFacts missing =
      NoModuleOr(absl::NotFoundError("/m.so cannot be loaded: no; searched: /a"));
  missing.module.search.libraries = {{"libcublasLt.so.13", ""}};
  EXPECT_EQ(Problem(missing)["problem"], "libcublasLt.so.13 is not found");
  EXPECT_THAT(Problem(missing)["advice"], HasSubstr("install the CUDA toolkit 13"));
  EXPECT_THAT(Problem(missing)["advice"], HasSubstr("LOCKSTEP_CUDA_LIBS"));
  missing.module.search.libraries = {{"libcudnn.so.9", ""}};
  EXPECT_THAT(Problem(missing)["advice"], HasSubstr("install cuDNN 9"));
  missing.module.search.libraries = {{"libcudnn.so.9", "/l/libcudnn.so.9"}};
  EXPECT_EQ(Problem(missing)["problem"], "/m.so cannot be loaded: no");
}

// Without a driver all else that is missing is said too, so that one visit is enough.
TEST(MachineJson, SaysAllThatIsMissing) {
  MachineFacts facts = NoModuleOr(absl::NotFoundError("no module"));
  facts.driver = {"", "", 1};
  const nlohmann::ordered_json problems = MachineJson(facts)["cuda"]["problems"];
  ASSERT_EQ(problems.size(), 2u);
  EXPECT_THAT(problems[0]["problem"], HasSubstr("no NVIDIA driver"));
  EXPECT_THAT(problems[1]["problem"], StartsWith("liblockstep_cuda.so is neither beside"));
}

TEST(LookAtMachine, SeesThisOne) {
  const TemporaryFolder folder;
  std::filesystem::create_directories(folder.path() + "/mnist");
  setenv("LOCKSTEP_DATA", folder.path().c_str(), 1);
  const MachineFacts facts = LookAtMachine();
  unsetenv("LOCKSTEP_DATA");
  EXPECT_EQ(facts.cpu.cores, AvailableCores());
  EXPECT_GT(facts.cpu.memory_bytes, uint64_t{64} << 20);
  EXPECT_NE(facts.cpu.fingerprint.empty(), facts.cpu.cannot_use.empty());
  EXPECT_TRUE(facts.data.exists);
  EXPECT_THAT(facts.data.folders, ::testing::ElementsAre("mnist"));
}

}  // namespace
}  // namespace lockstep::machine
