// Reads the #include lines of every source file and fails on an edge that DESIGN section 3 forbids;
// and shows by planted lines that each rule bites.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/layering/include_rules.h"

namespace lockstep::layering {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<std::string> SourceFiles() {
  namespace fs = std::filesystem;
  const fs::path root = LOCKSTEP_SOURCE_DIR;
  std::vector<std::string> files;
  for (const char* folder : {"common", "server", "worker", "client"}) {
    for (const auto& entry : fs::recursive_directory_iterator(root / folder)) {
      const std::string extension = entry.path().extension().string();
      for (const char* source : {".h", ".cc", ".cpp", ".hpp", ".inc", ".cu", ".cuh"}) {
        if (extension == source) files.push_back(fs::relative(entry.path(), root).string());
      }
    }
  }
  return files;
}

TEST(Layering, NoForbiddenInclude) {
  const std::vector<std::string> files = SourceFiles();
  ASSERT_GT(files.size(), 50u);
  for (const std::string& file : files) {
    std::ifstream in(std::string(LOCKSTEP_SOURCE_DIR) + "/" + file);
    const std::string content((std::istreambuf_iterator<char>(in)),
                              std::istreambuf_iterator<char>());
    ASSERT_FALSE(content.empty()) << file;
    for (const std::string& line : FindForbidden(file, content)) ADD_FAILURE() << line;
  }
}

TEST(Layering, RulesHaveNoCircle) { EXPECT_EQ(FindCircle(), ""); }

TEST(Layering, EveryPlantedEdgeIsFound) {
  struct Planted {
    const char* path;
    const char* include;
  };
  for (const Planted& p : std::vector<Planted>{
           // The three never include each other, and common includes none of them.
           {"server/core/scheduler.cc", "\"worker/train/step_loop.h\""},
           {"server/main.cc", "\"worker/agent/agent.h\""},
           {"server/rpc/service.cc", "\"client/session.h\""},
           {"worker/agent/agent.cc", "\"server/core/core.h\""},
           {"worker/main.cc", "\"client/session.h\""},
           {"client/run.cc", "\"server/core/core.h\""},
           {"client/main.cc", "\"worker/train/step_loop.h\""},
           {"common/fs.cc", "\"server/core/core.h\""},
           {"common/fs.cc", "\"common/spec/spec.h\""},
           {"common/fs.h", "\"lockstep/v1/job.pb.h\""},
           {"common/fs.h", "<google/protobuf/message.h>"},
           {"common/spec/load.cc", "\"common/rpc/status.h\""},
           // server: rpc, http, store -> core, never back.
           {"server/core/core.cc", "\"server/rpc/service.h\""},
           {"server/core/core.cc", "\"server/store/store.h\""},
           {"server/store/store.cc", "\"server/rpc/service.h\""},
           {"server/http/http.cc", "\"server/rpc/service.h\""},
           {"server/core/core.h", "<thread>"},
           {"server/core/core.h", "<fstream>"},
           {"server/core/core.h", "\"absl/synchronization/mutex.h\""},
           {"server/core/core.h", "\"absl/time/clock.h\""},
           {"server/core/core.h", "\"common/fs.h\""},
           {"server/rpc/service.cc", "<sqlite3.h>"},
           // worker: train on top, the narrow waist below.
           {"worker/nn/plan.cc", "\"worker/train/step_loop.h\""},
           {"worker/nn/plan.cc", "\"worker/optim/optimizer.h\""},
           {"worker/nn/plan.cc", "\"worker/collective/communicator.h\""},
           {"worker/nn/plan.cc", "\"worker/data/dataset.h\""},
           {"worker/nn/plan.cc", "\"worker/device/cpu/cpu_device.h\""},
           {"worker/nn/plan.cc", "\"common/spec/spec.h\""},
           {"worker/nn/plan.cc", "\"lockstep/v1/spec.pb.h\""},
           {"worker/optim/optimizer.cc", "\"worker/nn/plan.h\""},
           {"worker/optim/optimizer.cc", "\"lockstep/v1/spec.pb.h\""},
           {"worker/data/idx.cc", "\"worker/nn/plan.h\""},
           {"worker/data/idx.cc", "\"lockstep/v1/spec.pb.h\""},
           {"worker/collective/tree.cc", "\"worker/nn/plan.h\""},
           {"worker/collective/tree.cc", "\"lockstep/v1/spec.pb.h\""},
           {"worker/device/device.h", "\"worker/nn/plan.h\""},
           {"worker/device/device.h", "\"worker/device/cpu/kernels.h\""},
           {"worker/device/cpu/kernels/pool.cc", "\"worker/device/cuda/launch.h\""},
           {"worker/device/cpu/kernels/pool.cc", "\"google/protobuf/message.h\""},
           {"worker/train/step_loop.cc", "\"worker/agent/agent.h\""},
           {"worker/train/step_loop.cc", "\"worker/device/cpu/kernels.h\""},
           {"worker/train/step_loop.cc", "\"common/rpc/status.h\""},
           {"worker/agent/agent.cc", "\"worker/train/step_loop.h\""},
           {"worker/agent/agent.cc", "\"worker/machine/machine.h\""},
           {"worker/machine/machine.cc", "\"worker/train/member_job.h\""},
           {"worker/machine/machine.cc", "\"lockstep/v1/worker.pb.h\""},
           {"worker/main.cc", "\"worker/device/device.h\""},
           // gRPC and generated services.
           {"worker/train/step_loop.cc", "<grpcpp/grpcpp.h>"},
           {"worker/collective/gloo.cc", "<grpcpp/grpcpp.h>"},
           {"worker/nn/plan.cc", "\"lockstep/v1/worker.grpc.pb.h\""},
           {"server/core/core.cc", "\"lockstep/v1/worker.grpc.pb.h\""},
           {"server/core/core.cc", "<grpc/support/log.h>"},
           {"common/spec/load.cc", "<grpcpp/grpcpp.h>"},
           // Libraries that have one place.
           {"worker/device/cpu/cpu_device.cc", "<cuda_runtime.h>"},
           {"worker/nn/plan.cc", "<cudnn.h>"},
           {"worker/train/step_loop.cc", "<cublasLt.h>"},
           {"worker/device/cuda/stream.cc", "<nccl.h>"},
           {"worker/collective/gloo.cc", "<nccl.h>"},
           {"worker/train/step_loop.cc", "<gloo/context.h>"},
           {"worker/nn/plan.cc", "<dnnl.hpp>"},
           {"worker/nn/plan.cc", "\"oneapi/dnnl/dnnl.hpp\""},
           {"worker/nn/plan.cc", "<immintrin.h>"},
           {"worker/device/device.h", "<omp.h>"},
           {"client/spec.cc", "<yaml-cpp/yaml.h>"},
           {"server/core/core.cc", "\"CLI/CLI.hpp\""},
           {"worker/nn/plan.cc", "<gtest/gtest.h>"},
           {"client/run.cc", "\"tests/common/simulated_disk.h\""},
           // Ways round.
           {"worker/nn/plan.cc", "\"../train/step_loop.h\""},
           {"worker/nn/plan.cc", "\"plan.h\""},
           {"worker/nn/plan.cc", "<worker/train/step_loop.h>"},
           {"worker/nn/plan.cc", "<worker/nn/plan.h>"},
           {"worker/nn/plan.cc", "HEADER"},
           {"worker/nn/plan.cc", "\"worker/elsewhere/thing.h\""},
       }) {
    const std::string content =
        std::string("// A file.\n#include <vector>\n#include ") + p.include + "\n";
    const std::vector<std::string> found = FindForbidden(p.path, content);
    ASSERT_EQ(found.size(), 1u) << p.path << " " << p.include;
    EXPECT_THAT(found[0], HasSubstr(std::string(p.path) + ":3: "));
  }
}

TEST(Layering, EveryAllowedEdgeIsLetThrough) {
  struct Allowed {
    const char* path;
    const char* include;
  };
  for (const Allowed& a : std::vector<Allowed>{
           {"common/spec/load.cc", "\"lockstep/v1/spec.pb.h\""},
           {"common/spec/load.cc", "\"yaml-cpp/yaml.h\""},
           {"common/rpc/status.cc", "<grpcpp/grpcpp.h>"},
           {"server/rpc/service.cc", "\"lockstep/v1/worker.grpc.pb.h\""},
           {"server/rpc/service.cc", "\"server/core/core.h\""},
           {"server/store/store.cc", "<sqlite3.h>"},
           {"server/main.cc", "\"CLI/CLI.hpp\""},
           {"worker/train/step_loop.cc", "\"worker/nn/plan.h\""},
           {"worker/train/step_loop.cc", "\"worker/device/cpu/cpu_device.h\""},
           {"worker/train/checkpoint.cc", "<google/protobuf/util/json_util.h>"},
           {"worker/nn/plan.cc", "\"worker/optim/flat_state.h\""},
           {"worker/nn/plan.cc", "\"common/spec/graph.h\""},
           {"worker/agent/agent.cc", "<grpcpp/grpcpp.h>"},
           {"worker/main.cc", "\"worker/train/member_job.h\""},
           {"worker/main.cc", "\"worker/machine/machine.h\""},
           {"worker/machine/machine.cc", "\"worker/device/module/cuda_module.h\""},
           {"worker/device/cuda/stream.cu", "<cuda_runtime.h>"},
           {"worker/device/cpu/kernels/pool.cc", "<immintrin.h>"},
           {"worker/collective/nccl_communicator.cc", "<nccl.h>"},
           {"worker/collective/gloo_communicator.cc", "<gloo/context.h>"},
           {"client/main.cc", "<CLI/CLI.hpp>"},
           {"client/run.cc", "<filesystem>"},
       }) {
    EXPECT_THAT(FindForbidden(a.path, std::string("#include ") + a.include + "\n"), IsEmpty())
        << a.path << " " << a.include;
  }
}

TEST(Layering, ReadsIncludeLinesAsTheCompilerDoes) {
  EXPECT_THAT(
      FindForbidden("common/fs.cc", "  #  include  \"worker/nn/plan.h\"  // why\n"),
      ElementsAre(HasSubstr("common/fs.cc:1: worker/nn/plan.h: common may include only itself")));
  EXPECT_THAT(FindForbidden("common/fs.cc", "#include\"worker/nn/plan.h\"\n"), testing::SizeIs(1));
  EXPECT_THAT(FindForbidden("common/fs.cc", "#include_next <nccl.h>\n"), testing::SizeIs(1));
  EXPECT_THAT(FindForbidden("common/fs.cc", "// #include \"worker/nn/plan.h\"\n"), IsEmpty());
  EXPECT_THAT(FindForbidden("common/fs.cc", "const char* s = \"#include <nccl.h>\";\n"), IsEmpty());
}

TEST(Layering, AFolderWithoutARuleIsRefused) {
  EXPECT_EQ(LayerOf("worker/device/cpu/kernels/pool.cc"), "worker/device/cpu");
  EXPECT_EQ(LayerOf("worker/elsewhere/thing.cc"), "");
  EXPECT_THAT(FindForbidden("worker/elsewhere/thing.cc", ""), ElementsAre(HasSubstr("no rule")));
}

}  // namespace
}  // namespace lockstep::layering
