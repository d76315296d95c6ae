// What the state has on a GPU alone: the gradient's norm as the gate adds it up and as the host
// does, the same bits, also where the tree has several levels; and the parameters rounded to bf16.
#include <gtest/gtest.h>

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/philox.h"
#include "worker/device/device.h"
#include "worker/device/module/cuda_module.h"
#include "worker/optim/flat_state.h"
#include "worker/optim/gradient_norm.h"
#include "worker/optim/optimizer.h"

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
    struct Shared {
      device::StepScalars prepared, current, update;
      device::StepOutcome outcome;
      device::LeafResult result;
      device::GateNotes notes;
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
    gate.notes = &shared->notes;
    device->Gate(*stream, gate, {}, memory->floats());
    ASSERT_TRUE(stream->Synchronize().ok());
    EXPECT_GT(norm->Value(), 1);
    EXPECT_EQ(shared->outcome.gradient_norm, norm->Value()) << tensors << " tensors";
    EXPECT_EQ(shared->outcome.applied, 1u);
  }
}

TEST(RoundedParametersTest, FollowTheParameters) {
  const auto module = device::LoadCudaModule();
  ASSERT_TRUE(module.ok()) << module.status();
  const std::unique_ptr<device::Device> device = (*module)->make_device(0).value();
  const auto stream = device->MakeStream().value();
  const spec::Initializer uniform{spec::Initializer::Type::kUniform, 1};
  FlatLayout layout;
  for (const int64_t size : {int64_t{5000}, int64_t{13}, int64_t{300}}) {
    layout.tensors.push_back(
        {absl::StrCat("w", layout.size), {size}, layout.size, size, size > 100, uniform});
    layout.size +=
        (size + FlatLayout::kAlignment - 1) / FlatLayout::kAlignment * FlatLayout::kAlignment;
  }
  const int64_t size = layout.size;
  const auto read = [&](const auto* from) {
    std::vector<std::remove_cvref_t<decltype(*from)>> values(size);
    device->Copy(*stream, from, values.data(), size * sizeof(*from));
    EXPECT_TRUE(stream->Synchronize().ok());
    return values;
  };
  const auto memory = device->Allocate(sizeof(uint16_t) * size).value();
  const auto expected = [&](FlatState& state) {
    auto* const rounded = static_cast<uint16_t*>(memory->data());
    device->RoundToBf16(*stream, size, state.parameters(), rounded);
    return read(rounded);
  };
  for (int type = 0; type < device::kOptimizerTypes; ++type) {
    SCOPED_TRACE(type);
    const device::OptimizerCoefficients coefficients{
        .type = static_cast<device::OptimizerType>(type),
        .momentum = 0.9f,
        .beta1 = 0.9f,
        .beta2 = 0.99f,
        .rho = 0.9f,
        .epsilon = 0.1f,
        .l2 = 0.01f};
    const auto make = [&](device::Precision precision) {
      return FlatState::Make(*device, layout, {}, coefficients.type, precision).value();
    };
    EXPECT_EQ(make(device::Precision::kFp32)->rounded(), nullptr);
    EXPECT_EQ(make(device::Precision::kTf32)->rounded(), nullptr);
    const auto state = make(device::Precision::kBf16), plain = make(device::Precision::kFp32);
    ASSERT_NE(state->rounded(), nullptr);
    for (FlatState* const of : {state.get(), plain.get()}) {
      ASSERT_TRUE(InitializeOnDevice(*device, *stream, layout, 3, of->parameters()).ok());
    }
    // In parts that do not begin at tensors.
    for (const auto& [begin, end] :
         {std::pair<int64_t, int64_t>(0, 48), {48, 4999}, {4999, size}}) {
      state->RoundParameters(*device, *stream, begin, end);
    }
    EXPECT_EQ(read(state->rounded()), expected(*state));

    const Optimizer optimizer(coefficients, layout);
    const auto pieces = optimizer.MakePieces(*device, 0, size).value();
    const auto gradient = device->Allocate(sizeof(float) * size).value();
    ASSERT_TRUE(InitializeOnDevice(*device, *stream, layout, 4, gradient->floats()).ok());
    const auto scalars_memory = device->AllocateHostVisible(sizeof(device::StepScalars)).value();
    auto* const scalars = new (scalars_memory->data()) device::StepScalars();
    ScheduleOptions schedule;
    schedule.learning_rate = 0.1;
    optimizer.Prepare(schedule, 1, scalars);
    const std::vector<uint16_t> before = read(state->rounded());
    for (FlatState* const of : {state.get(), plain.get()}) {
      optimizer.Update(*device, *stream, pieces, scalars, gradient->floats(), *of);
    }
    const std::vector<uint16_t> after = read(state->rounded());
    EXPECT_NE(after, before);
    EXPECT_EQ(after, expected(*state));
    for (FlatState* const of : {state.get(), plain.get()}) {
      optimizer.Update(*device, *stream, 0, 100, scalars, gradient->floats(), *of);
      optimizer.Update(*device, *stream, 100, size, scalars, gradient->floats(), *of);
    }
    EXPECT_NE(read(state->rounded()), after);
    EXPECT_EQ(read(state->rounded()), expected(*state));
    EXPECT_EQ(read(state->parameters()), read(plain->parameters()));
    // A step that is not applied.
    const std::vector<uint16_t> last = read(state->rounded());
    scalars->apply = 0;
    optimizer.Update(*device, *stream, pieces, scalars, gradient->floats(), *state);
    EXPECT_EQ(read(state->rounded()), last);
  }
}

}  // namespace
}  // namespace lockstep::optim
