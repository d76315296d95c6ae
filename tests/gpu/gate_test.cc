// The gradient's norm as the gate on a GPU adds it up and as the host does: the same bits, also
// where the tree has several levels.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "common/philox.h"
#include "worker/device/device.h"
#include "worker/device/module/cuda_module.h"
#include "worker/optim/gradient_norm.h"

namespace lockstep::optim {
namespace {

TEST(GateNormTest, HasTheBitsOfTheHosts) {
  const auto module = device::LoadCudaModule();
  ASSERT_TRUE(module.ok()) << module.status();
  const std::unique_ptr<device::Device> device = (*module)->make_device(0).value();
  const auto stream = device->MakeStream().value();
  for (const size_t tensors : {1, 4, 45}) {
    // 97, 1, 33 and 65 blocks, and many tensors of one.
    std::vector<int64_t> sizes = {device::kNormBlock * 96 + 5, 7, device::kNormBlock * 33,
                                  device::kNormBlock * 64 + 1};
    sizes.resize(tensors, 100);
    FlatLayout layout;
    for (const int64_t size : sizes) {
      TensorView view;
      view.offset = layout.size;
      view.size = size;
      layout.tensors.push_back(view);
      layout.size +=
          (size + FlatLayout::kAlignment - 1) / FlatLayout::kAlignment * FlatLayout::kAlignment;
    }
    std::vector<float> gradient(layout.size);
    const PhiloxKey key = MakePhiloxKey(7, "gradient");
    for (size_t i = 0; i < gradient.size(); ++i) gradient[i] = ToUniform(Philox(key, i, 0).x[0]);
    const auto memory = device->Allocate(sizeof(float) * gradient.size()).value();
    device->Copy(*stream, gradient.data(), memory->data(), memory->size());

    const auto norm = GradientNorm::Make(*device, layout).value();
    norm->Sum(*device, *stream, 0, 1, memory->floats());
    norm->SumForGate(*device, *stream, memory->floats());
    struct Shared {
      device::StepScalars prepared, current, update;
      device::StepOutcome outcome;
      device::LeafResult result;
    };
    const auto shared_memory = device->AllocateHostVisible(sizeof(Shared)).value();
    auto* shared = new (shared_memory->data()) Shared();
    device::StepGate gate;
    norm->Describe(&gate);
    gate.results = &shared->result;
    gate.leaves = 1;
    gate.prepared = &shared->prepared;
    gate.current = &shared->current;
    gate.update = &shared->update;
    gate.outcomes = &shared->outcome;
    device->Gate(*stream, gate);
    ASSERT_TRUE(stream->Synchronize().ok());
    EXPECT_GT(norm->Value(), 1);
    EXPECT_EQ(shared->outcome.gradient_norm, norm->Value()) << tensors << " tensors";
    EXPECT_EQ(shared->outcome.applied, 1u);
  }
}

}  // namespace
}  // namespace lockstep::optim
