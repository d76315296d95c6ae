#include "worker/optim/optimizer.h"

#include <cmath>
#include <fstream>
#include <map>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "worker/device/cpu/cpu_device.h"
#include "worker/optim/gradient_norm.h"

namespace lockstep::optim {
namespace {

using device::OptimizerType;
using Schedule = ScheduleOptions;

device::Device& TestDevice() {
  static device::Device* device = device::MakeCpuDevice().value().release();
  return *device;
}

// ---- schedules: tables of closed forms

TEST(ScheduleTest, Constant) {
  Schedule schedule;
  schedule.learning_rate = 0.1;
  for (const int64_t step : {1, 2, 1000000}) EXPECT_EQ(LearningRate(schedule, step), 0.1);
}

TEST(ScheduleTest, WarmUpIsLinearAndReachesTheFullRate) {
  Schedule schedule;
  schedule.learning_rate = 0.8;
  schedule.warmup_steps = 4;
  const double expected[] = {0.2, 0.4, 0.6, 0.8, 0.8, 0.8};
  for (int step = 1; step <= 6; ++step) {
    EXPECT_DOUBLE_EQ(LearningRate(schedule, step), expected[step - 1]) << step;
  }
}

TEST(ScheduleTest, StepsMultiplyFromTheStepAfter) {
  Schedule schedule;
  schedule.type = Schedule::Type::kStep;
  schedule.learning_rate = 1;
  schedule.at_steps = {3, 5, 5};
  schedule.factor = 0.5;
  schedule.warmup_steps = 2;
  const double expected[] = {0.5, 1, 1, 0.5, 0.5, 0.125, 0.125};
  for (int step = 1; step <= 7; ++step) {
    EXPECT_DOUBLE_EQ(LearningRate(schedule, step), expected[step - 1]) << step;
  }
}

TEST(ScheduleTest, CosineEndsAtItsFloor) {
  Schedule schedule;
  schedule.type = Schedule::Type::kCosine;
  schedule.learning_rate = 2;
  schedule.floor = 0.1;
  schedule.warmup_steps = 2;
  schedule.total_steps = 6;
  // Progress 0 at the end of the warm-up, then 1/4, 1/2, 3/4, 1.
  const double half = std::sqrt(0.5);
  const double expected[] = {1,  2, 0.2 + 1.8 * (1 + half) / 2, 1.1, 0.2 + 1.8 * (1 - half) / 2,
                             0.2};
  for (int step = 1; step <= 6; ++step) {
    EXPECT_NEAR(LearningRate(schedule, step), expected[step - 1], 1e-15) << step;
  }
  EXPECT_DOUBLE_EQ(LearningRate(schedule, 7), 0.2);
}

TEST(ScheduleTest, CosineOfARunThatIsAllWarmUp) {
  Schedule schedule;
  schedule.type = Schedule::Type::kCosine;
  schedule.learning_rate = 2;
  schedule.warmup_steps = 5;
  schedule.total_steps = 3;
  EXPECT_DOUBLE_EQ(LearningRate(schedule, 3), 1.2);
  EXPECT_TRUE(std::isfinite(LearningRate(schedule, 6)));
}

// ---- updates

// A weight of 8 that decays and a bias of 5 that does not, as make_goldens.py has them; and a
// second weight, so that equal coefficients do not always lie side by side.
FlatLayout GoldenLayout(double rate_multiplier = 1, double decay_multiplier = 1) {
  FlatLayout layout;
  layout.tensors = {{"weight", {8}, 0, 8, true, {}, TensorKey("weight")},
                    {"bias", {5}, 16, 5, false, {}, TensorKey("bias")},
                    {"weight2", {3}, 32, 3, true, {}, TensorKey("weight2")}};
  layout.tensors[0].rate_multiplier = rate_multiplier;
  layout.tensors[0].decay_multiplier = decay_multiplier;
  layout.size = 48;
  return layout;
}

class Trainer {
 public:
  explicit Trainer(const device::OptimizerCoefficients& coefficients,
                   const FlatLayout& layout = GoldenLayout(), double clip_norm = 0)
      : state_(FlatState::Make(TestDevice(), layout, {}, coefficients.type).value()),
        optimizer_(coefficients, state_->parameter_layout()),
        norm_(GradientNorm::Make(TestDevice(), layout).value()),
        clip_norm_(clip_norm),
        stream_(TestDevice().MakeStream().value()),
        gradient_(48, 0.0f) {
    schedule_.type = Schedule::Type::kStep;
    schedule_.learning_rate = 0.05;
    schedule_.at_steps = {10};
    schedule_.factor = 0.5;
    for (const TensorView& view : state_->parameter_layout().tensors) {
      for (int64_t i = 0; i < view.size; ++i) {
        state_->parameters()[view.offset + i] =
            static_cast<float>(0.1 * static_cast<double>(i - 3));
      }
    }
  }
  // The update cut into ranges at `cuts`.
  void Step(int64_t t, const std::vector<int64_t>& cuts = {}) {
    for (const TensorView& view : state_->parameter_layout().tensors) {
      for (int64_t i = 0; i < view.size; ++i) {
        const double w = state_->parameters()[view.offset + i];
        gradient_[view.offset + i] = static_cast<float>(
            0.5 * w - 0.3 + 0.25 * (static_cast<double>((7 * i + 3 * t) % 5) - 2));
      }
    }
    device::StepScalars scalars;
    optimizer_.Prepare(schedule_, t, &scalars);
    norm_->Sum(TestDevice(), *stream_, 0, 1, gradient_.data());
    scalars.gradient_scale = static_cast<float>(ClipScale(norm_->Value(), clip_norm_));
    int64_t begin = 0;
    for (const int64_t end : cuts) {
      optimizer_.Update(TestDevice(), *stream_, begin, end, &scalars, gradient_.data(), *state_);
      begin = end;
    }
    optimizer_.Update(TestDevice(), *stream_, begin, 48, &scalars, gradient_.data(), *state_);
  }
  std::vector<float> Parameters() {
    return std::vector<float>(state_->parameters(), state_->parameters() + 48);
  }
  FlatState& state() { return *state_; }

 private:
  std::unique_ptr<FlatState> state_;
  Optimizer optimizer_;
  std::unique_ptr<GradientNorm> norm_;
  const double clip_norm_;
  std::unique_ptr<device::Stream> stream_;
  std::vector<float> gradient_;
  Schedule schedule_;
};

device::OptimizerCoefficients Coefficients(OptimizerType type, double l2, double weight_decay) {
  device::OptimizerCoefficients c;
  c.type = type;
  c.momentum = 0.9f;
  c.beta1 = 0.9f;
  c.beta2 = 0.99f;
  c.rho = 0.9f;
  c.epsilon = 1e-8f;
  c.l2 = static_cast<float>(l2);
  c.weight_decay = static_cast<float>(weight_decay);
  return c;
}

std::vector<OptimizerType> AllTypes() {
  std::vector<OptimizerType> types;
  for (int i = 0; i < device::kOptimizerTypes; ++i) types.push_back(static_cast<OptimizerType>(i));
  return types;
}

const nlohmann::json& Goldens() {
  static const auto& goldens = *new nlohmann::json([] {
    std::ifstream file(LOCKSTEP_SOURCE_DIR "/tests/optim/optimizer_goldens.json");
    return nlohmann::json::parse(file);
  }());
  return goldens;
}

device::OptimizerCoefficients CoefficientsOf(const nlohmann::json& golden) {
  const std::string type = golden["type"];
  const bool momentum = golden["momentum"] > 0.0, centered = golden["centered"];
  const OptimizerType rmsprop = momentum   ? centered ? OptimizerType::kRmsPropCenteredMomentum
                                                      : OptimizerType::kRmsPropMomentum
                                : centered ? OptimizerType::kRmsPropCentered
                                           : OptimizerType::kRmsProp;
  const std::map<std::string, OptimizerType> types = {{"sgd", OptimizerType::kSgd},
                                                      {"momentum", OptimizerType::kMomentum},
                                                      {"nesterov", OptimizerType::kNesterov},
                                                      {"adam", OptimizerType::kAdam},
                                                      {"adagrad", OptimizerType::kAdagrad},
                                                      {"adadelta", OptimizerType::kAdadelta},
                                                      {"rmsprop", rmsprop}};
  device::OptimizerCoefficients c =
      Coefficients(types.at(type), golden["l2"], golden["weight_decay"]);
  c.momentum = golden["momentum"];
  c.rho = golden["rho"];
  c.epsilon = golden["epsilon"];
  if (golden["clip_value"] > 0.0) c.clip_value = golden["clip_value"];
  return c;
}

// The goldens are float64. 20 updates of values below 1, each with a handful of fp32 roundings that
// the gradient (0.5 w) and momentum (a factor of at most 1 / (1 - 0.9)) feed back: 3e-6. A centered
// RMSProp subtracts two nearly equal squares at first, which loses one digit more.
TEST(OptimizerTest, TwentyUpdatesAgreeWithPyTorch) {
  ASSERT_EQ(Goldens()["cases"].size(), 25u);
  for (const auto& golden : Goldens()["cases"]) {
    SCOPED_TRACE(golden["name"].get<std::string>());
    FlatLayout layout = GoldenLayout(golden["rate_multiplier"], golden["decay_multiplier"]);
    layout.tensors.pop_back();  // PyTorch has two tensors, and the norm is of all
    Trainer trainer(CoefficientsOf(golden), layout, golden["clip_norm"]);
    const double tolerance = golden["centered"] ? 3e-5 : 3e-6;
    int compared = 0;
    for (int64_t t = 1; t <= 20; ++t) {
      trainer.Step(t);
      const auto found = golden["parameters"].find(std::to_string(t));
      if (found == golden["parameters"].end()) continue;
      const std::vector<float> w = trainer.Parameters();
      for (int i = 0; i < 13; ++i) {
        EXPECT_NEAR(w[i < 8 ? i : i + 8], (*found)[i].get<double>(), tolerance)
            << "step " << t << " [" << i << "]";
        ++compared;
      }
    }
    EXPECT_EQ(compared, 4 * 13);
  }
}

TEST(OptimizerTest, BitsDoNotDependOnWhereTheVectorIsCut) {
  for (const OptimizerType type : AllTypes()) {
    Trainer whole(Coefficients(type, 0.1, 0.01)), cut(Coefficients(type, 0.1, 0.01));
    for (int64_t t = 1; t <= 5; ++t) {
      whole.Step(t);
      cut.Step(t, {1, 7, 8, 17, 19, 33, 34, 48});
    }
    for (size_t i = 0; i < whole.state().named().size(); ++i) {
      const auto &a = whole.state().named()[i], &b = cut.state().named()[i];
      for (int64_t e = 0; e < a.size; ++e) EXPECT_EQ(a.data[e], b.data[e]) << a.name << e;
    }
  }
}

TEST(OptimizerTest, PaddingStaysZero) {
  for (const OptimizerType type : AllTypes()) {
    Trainer trainer(Coefficients(type, 0.1, 0.01));
    for (int64_t t = 1; t <= 3; ++t) trainer.Step(t);
    const std::vector<float> w = trainer.Parameters();
    for (const int i : {8, 15, 21, 31, 35, 47}) EXPECT_EQ(w[i], 0) << i;
  }
}

TEST(OptimizerTest, DecayLeavesTensorsThatDoNotDecayAlone) {
  Trainer plain(Coefficients(OptimizerType::kSgd, 0, 0)),
      decays(Coefficients(OptimizerType::kSgd, 0.1, 0.1));
  plain.Step(1);
  decays.Step(1);
  for (int i = 0; i < 48; ++i) {
    const bool weight = i < 8 || i >= 32;
    const bool has_value = i < 35 && plain.Parameters()[i] != 0;
    if (has_value && weight && i % 16 != 3) {  // element 3 is 0 at first: nothing to decay
      EXPECT_NE(plain.Parameters()[i], decays.Parameters()[i]) << i;
    } else {
      EXPECT_EQ(plain.Parameters()[i], decays.Parameters()[i]) << i;
    }
  }
}

TEST(OptimizerTest, AMultiplierOfZeroFreezesItsTensorAlone) {
  for (const OptimizerType type : AllTypes()) {
    Trainer frozen(Coefficients(type, 0.1, 0.1), GoldenLayout(/*rate_multiplier=*/0));
    Trainer free(Coefficients(type, 0.1, 0.1));
    const std::vector<float> before = frozen.Parameters();
    for (int64_t t = 1; t <= 3; ++t) frozen.Step(t), free.Step(t);
    const std::vector<float> after = frozen.Parameters(), moved = free.Parameters();
    for (int i = 0; i < 48; ++i) {
      EXPECT_EQ(after[i], i < 8 ? before[i] : moved[i]) << static_cast<int>(type) << " " << i;
      if (i < 8) {
        EXPECT_NE(after[i], moved[i]) << static_cast<int>(type) << " " << i;
      }
    }
  }
}

TEST(OptimizerTest, PrepareFillsInWhatKernelsRead) {
  const Optimizer adam(Coefficients(OptimizerType::kAdam, 0, 0), GoldenLayout());
  Schedule schedule;
  schedule.learning_rate = 0.25;
  schedule.warmup_steps = 2;
  device::StepScalars scalars;
  adam.Prepare(schedule, 1, &scalars);
  EXPECT_EQ(scalars.step, 1u);
  EXPECT_EQ(scalars.learning_rate, 0.125f);
  // Of the betas as the kernels have them, in fp32: one update's m / c1 is g, its v / c2 is g^2.
  EXPECT_EQ(scalars.adam_correction1, static_cast<float>(1 - double{0.9f}));
  EXPECT_EQ(scalars.adam_correction2, static_cast<float>(1 - double{0.99f}));
  adam.Prepare(schedule, 1000000, &scalars);
  EXPECT_EQ(scalars.step, 1000000u);
  EXPECT_EQ(scalars.learning_rate, 0.25f);
  EXPECT_EQ(scalars.adam_correction1, 1.0f);
  EXPECT_EQ(scalars.adam_correction2, 1.0f);
}

}  // namespace
}  // namespace lockstep::optim
