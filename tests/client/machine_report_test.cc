#include "client/machine_report.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

using nlohmann::ordered_json;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

ordered_json GoodGpu() {
  return ordered_json::parse(R"({
    "cpu": {"model":"AMD EPYC","cores":2,"memory_bytes":17179869184,"instruction_set":"avx512",
            "fingerprint":"cpu avx512 onednn 2.7.3","cannot_use":""},
    "cuda": {"driver":"13.0","kernel_driver":"580.65.06","pci_gpus":1,
             "module":"/opt/liblockstep_cuda.so","module_error":"","runtime":"13.0",
             "cublaslt":"cublaslt 13.1.0","cudnn":"cudnn 9.12.0","nccl":"",
             "libraries":[{"name":"libcublasLt.so.13","path":"/opt/cuda/libcublasLt.so.13"},
                          {"name":"libcudnn.so.9","path":"by the system's loader"}],
             "folders":["/opt/cuda"],
             "gpus":[{"ordinal":0,"name":"NVIDIA H200","compute_capability":"9.0",
                      "multiprocessors":132,"memory_bytes":150323855360,"free_bytes":149250113536,
                      "peers":[1],"cannot_use":""}],
             "problems":[]},
    "data": {"root":"/srv/data","exists":true,"folders":["cifar10","mnist"]}})");
}

ordered_json WithProblem(const std::string& problem, const std::string& advice) {
  ordered_json machine = GoodGpu();
  machine["cuda"]["gpus"] = ordered_json::array();
  machine["cuda"]["problems"] = ordered_json::array({{{"problem", problem}, {"advice", advice}}});
  return machine;
}

std::string Report(const ordered_json& machine, const std::string& device = "") {
  EXPECT_TRUE(CheckMachine(machine).ok()) << CheckMachine(machine);
  return MachineText(machine, device, Terminal());
}

TEST(MachineReport, OfAGoodGpu) {
  EXPECT_EQ(Report(GoodGpu()), R"(CPU
  processor      AMD EPYC, 2 cores, 16.0 GiB memory
  computes with  avx512 (cpu avx512 onednn 2.7.3)

CUDA
  driver             serves CUDA 13.0 (version 580.65.06)
  module             /opt/liblockstep_cuda.so (CUDA 13.0)
  computes with      cublaslt 13.1.0, cudnn 9.12.0
  libcublasLt.so.13  /opt/cuda/libcublasLt.so.13
  libcudnn.so.9      by the system's loader

GPUs
  GPU  NAME         COMPUTE CAPABILITY  MULTIPROCESSORS     MEMORY       FREE  PEERS  USABLE
    0  NVIDIA H200  9.0                             132  140.0 GiB  139.0 GiB  1      yes

Data
  LOCKSTEP_DATA  /srv/data: cifar10, mnist

Next
  lockstep run deploy/jobs/mlp.yaml --device cuda
)");
  EXPECT_EQ(WhyUnusable(GoodGpu(), "cpu"), "");
  EXPECT_EQ(WhyUnusable(GoodGpu(), "cuda"), "");
  EXPECT_THAT(Report(GoodGpu(), "cpu"), EndsWith("  lockstep run deploy/jobs/mlp.yaml\n"));
}

TEST(MachineReport, WithoutADriver) {
  ordered_json machine = WithProblem("there is no NVIDIA driver", "install one");
  machine["cuda"]["driver"] = machine["cuda"]["kernel_driver"] = "";
  machine["cuda"]["module"] = machine["cuda"]["cublaslt"] = machine["cuda"]["cudnn"] = "";
  machine["cuda"]["libraries"] = ordered_json::array();
  machine["data"] = {{"root", ""}, {"exists", false}, {"folders", ordered_json::array()}};
  EXPECT_EQ(Report(machine), R"(CPU
  processor      AMD EPYC, 2 cores, 16.0 GiB memory
  computes with  avx512 (cpu avx512 onednn 2.7.3)

CUDA
  driver  none
  module  none

GPUs: none

Data
  LOCKSTEP_DATA  not set; a spec's relative data.path needs it

To use a GPU
  - there is no NVIDIA driver
    install one

Next
  lockstep run deploy/jobs/mlp.yaml
)");
  EXPECT_EQ(WhyUnusable(machine, "cpu"), "");
  EXPECT_EQ(WhyUnusable(machine, "cuda"),
            "no GPU can be used: there is no NVIDIA driver; install one");
  // Nothing to try on what cannot be used.
  EXPECT_THAT(Report(machine, "cuda"), Not(HasSubstr("Next")));
}

TEST(MachineReport, WithADriverThatIsTooOld) {
  ordered_json machine =
      WithProblem("the NVIDIA driver is too old: it serves CUDA 12.2, needed is 13.0", "update it");
  machine["cuda"]["driver"] = "12.2";
  machine["cuda"]["kernel_driver"] = "535.104";
  const std::string text = Report(machine);
  EXPECT_THAT(text, HasSubstr("serves CUDA 12.2 (version 535.104)\n"));
  EXPECT_THAT(text,
              HasSubstr("To use a GPU\n  - the NVIDIA driver is too old: it serves CUDA 12.2, "
                        "needed is 13.0\n    update it\n"));
  EXPECT_THAT(text, EndsWith("Next\n  lockstep run deploy/jobs/mlp.yaml\n"));
}

TEST(MachineReport, WithAMissingLibrary) {
  ordered_json machine = WithProblem("libcudnn.so.9 is not found", "install cuDNN 9");
  machine["cuda"]["module"] = "";
  machine["cuda"]["libraries"][1]["path"] = "";
  const std::string text = Report(machine);
  EXPECT_THAT(text, HasSubstr("  libcudnn.so.9      not found\n"
                              "  searched           /opt/cuda, and where the system looks\n"));
  EXPECT_THAT(text, HasSubstr("  - libcudnn.so.9 is not found\n    install cuDNN 9\n"));
}

TEST(MachineReport, OfTwoGpusOfWhichOneIsTooOld) {
  ordered_json machine = GoodGpu();
  ordered_json old = machine["cuda"]["gpus"][0];
  old["ordinal"] = 1;
  old["name"] = "Tesla V100";
  old["compute_capability"] = "7.0";
  old["peers"] = ordered_json::array();
  old["cannot_use"] = "GPU 1 (Tesla V100) has compute capability 7.0; needed: 8.0";
  machine["cuda"]["gpus"].push_back(old);
  machine["cuda"]["problems"].push_back(
      {{"problem", old["cannot_use"]}, {"advice", "use another GPU"}});
  const std::string text = Report(machine);
  EXPECT_THAT(text, HasSubstr("none   no\n"));
  EXPECT_THAT(text, HasSubstr("What is wrong\n  - GPU 1 (Tesla V100) has compute capability 7.0"));
  EXPECT_EQ(WhyUnusable(machine, "cuda"), "");
  machine["cuda"]["gpus"].erase(0);
  EXPECT_THAT(WhyUnusable(machine, "cuda"), HasSubstr("GPU 1 (Tesla V100) has compute capability"));
}

TEST(MachineReport, OfACpuThatCannotBeUsed) {
  ordered_json machine = WithProblem("there is no NVIDIA driver", "install one");
  machine["cpu"]["cannot_use"] = "the processor lacks AVX2; use another machine";
  EXPECT_EQ(WhyUnusable(machine, "cpu"),
            "the CPU cannot be used: the processor lacks AVX2; use another machine");
  EXPECT_THAT(Report(machine), HasSubstr("nothing: the processor lacks AVX2"));
  EXPECT_THAT(Report(machine), Not(HasSubstr("Next")));
}

TEST(MachineReport, TellsWhenTheDataFolderIsNotThere) {
  ordered_json machine = GoodGpu();
  machine["data"]["exists"] = false;
  EXPECT_THAT(Report(machine), HasSubstr("LOCKSTEP_DATA  /srv/data: no such folder"));
}

TEST(MachineReport, RefusesWhatIsNone) {
  EXPECT_FALSE(CheckMachine(ordered_json::array()).ok());
  for (const char* part : {"cpu", "cuda", "data"}) {
    const ordered_json good = GoodGpu();
    for (const auto& item : good[part].items()) {
      ordered_json machine = good;
      machine[part][item.key()] = ordered_json{{"of", "another kind"}};
      const bool shown = item.key() != "pci_gpus" && item.key() != "module_error";
      EXPECT_EQ(CheckMachine(machine).ok(), !shown) << part << "." << item.key();
    }
    ordered_json machine = good;
    machine.erase(part);
    EXPECT_FALSE(CheckMachine(machine).ok()) << part;
  }
  ordered_json machine = GoodGpu();
  machine["cuda"]["gpus"][0]["peers"][0] = "1";
  EXPECT_FALSE(CheckMachine(machine).ok());
}

}  // namespace
}  // namespace lockstep::client
