// Lstm against its definition in double, its gradients against the definition's differences.
#include <cmath>
#include <numeric>
#include <string>
#include <thread>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

using Values = std::vector<double>;

std::string Describe(const LstmShape& s) {
  return "steps " + std::to_string(s.steps) + " in " + std::to_string(s.in) + " hidden " +
         std::to_string(s.hidden) + (s.bidirectional ? " bidirectional" : "") +
         (s.bias ? " bias" : "") + (s.sequence ? " sequence" : "");
}

// Of one direction: weight_ih, weight_hh, bias_ih, bias_hh.
constexpr int kTensors = 4;
int64_t TensorSize(const LstmShape& s, int tensor) {
  return 4 * s.hidden * (tensor == 0 ? s.in : tensor == 1 ? s.hidden : 1);
}

// y of x and of the tensors of all directions, in double.
Values Reference(const LstmShape& s, const Values& x, const std::vector<Values>& tensors) {
  const bool bf16 = s.precision == Precision::kBf16;  // x and tensors are rounded already
  const int64_t rows = static_cast<int64_t>(x.size()) / (s.steps * s.in), h = s.hidden;
  const auto logistic = [](double v) { return 1 / (1 + std::exp(-v)); };
  Values y(rows * s.outputs());
  for (int64_t d = 0; d < s.directions(); ++d) {
    const Values* const t = &tensors[d * kTensors];
    for (int64_t r = 0; r < rows; ++r) {
      Values state(h), cell(h);
      for (int64_t k = 0; k < s.steps; ++k) {
        const int64_t time = d == 0 ? k : s.steps - 1 - k;
        Values gates(4 * h);
        for (int64_t g = 0; g < 4 * h; ++g) {
          if (s.bias) gates[g] = t[2][g] + t[3][g];
          for (int64_t i = 0; i < s.in; ++i)
            gates[g] += t[0][g * s.in + i] * x[(r * s.steps + time) * s.in + i];
          for (int64_t i = 0; i < h; ++i) {
            const double factor = bf16 ? RoundedToBf16(static_cast<float>(state[i])) : state[i];
            gates[g] += t[1][g * h + i] * factor;
          }
        }
        for (int64_t u = 0; u < h; ++u) {
          cell[u] =
              logistic(gates[h + u]) * cell[u] + logistic(gates[u]) * std::tanh(gates[2 * h + u]);
          state[u] = logistic(gates[3 * h + u]) * std::tanh(cell[u]);
          if (s.sequence) y[(r * s.steps + time) * s.out() + d * h + u] = state[u];
        }
      }
      for (int64_t u = 0; u < h && !s.sequence; ++u) y[r * s.out() + d * h + u] = state[u];
    }
  }
  return y;
}

struct LstmData {
  LstmData(const LstmShape& s, int64_t rows)
      : x(RandomFloats(rows * s.steps * s.in, 21)), dy(RandomFloats(rows * s.outputs(), 22)) {
    for (int64_t i = 0; i < s.directions() * kTensors; ++i) {
      const float limit = 1.5f / std::sqrt(static_cast<float>(i % kTensors == 0 ? s.in : s.hidden));
      tensors.push_back(RandomFloats(TensorSize(s, i % kTensors), 23 + i, -limit, limit));
    }
  }
  std::vector<Values> InDouble() const {
    std::vector<Values> values;
    for (const auto& tensor : tensors) values.push_back(ToDoubles(tensor));
    return values;
  }
  std::vector<float> x, dy;
  std::vector<std::vector<float>> tensors;
};

const std::vector<LstmShape>& SmallShapes() {
  static const auto& shapes = *new std::vector<LstmShape>{
      {1, 1, 1, false, true, false}, {4, 3, 2, false, true, false}, {3, 2, 5, true, true, true},
      {3, 4, 3, true, false, false}, {2, 3, 17, false, true, true}, {1, 2, 3, true, true, true}};
  return shapes;
}

class LstmTest : public DeviceTest {
 protected:
  struct Result {
    std::vector<float> y, dx;
    std::vector<std::vector<float>> gradients;
  };

  struct Weights {
    std::vector<Buffer<float>> tensors;
    std::vector<Buffer<uint16_t>> rounded;
  };

  // What Pack was given, which must stay.
  Weights Pack(Lstm& lstm, const LstmShape& s, const LstmData& d) {
    Weights weights;
    for (const auto& tensor : d.tensors) {
      weights.tensors.push_back(In(tensor));
      weights.rounded.push_back(InBf16(weights.tensors.back()));
    }
    lstm.Pack(stream(), ByDirection<const float>(s, weights.tensors),
              ByDirection<const uint16_t>(s, weights.rounded));
    return weights;
  }
  template <class Element, class T>
  static std::vector<LstmTensors<Element>> ByDirection(const LstmShape& s,
                                                       const std::vector<Buffer<T>>& tensors) {
    std::vector<LstmTensors<Element>> directions(s.directions());
    for (int64_t k = 0; k < s.directions(); ++k) {
      const Buffer<T>* const of = tensors.data() + k * kTensors;
      directions[k] = {of[0], of[1], nullptr, nullptr};
      if (!s.bias) continue;
      directions[k].bias_ih = of[2];
      directions[k].bias_hh = of[3];
    }
    return directions;
  }

  // Forward and backward of `rows` rows of the data, in guarded memory.
  Result Run(Lstm& lstm, const LstmShape& s, const LstmData& d, int64_t rows, bool want_dx = true) {
    const Weights weights = Pack(lstm, s, d);
    std::vector<Buffer<float>> gradients;
    for (const auto& tensor : d.tensors) gradients.push_back(Out(tensor.size()));
    const std::vector<LstmTensors<float>> out = ByDirection<float>(s, gradients);
    const auto x = In(std::vector<float>(d.x.begin(), d.x.begin() + rows * s.steps * s.in));
    const auto dy = In(std::vector<float>(d.dy.begin(), d.dy.begin() + rows * s.outputs()));
    const auto y = Out(rows * s.outputs()), dx = Out(rows * s.steps * s.in),
               reserve = Out(rows * s.reserve());
    const auto scratch = Scratch(lstm.scratch_bytes());
    lstm.Forward(stream(), rows, x, y, reserve, scratch);
    lstm.Backward(stream(), rows, x, dy, reserve, out, want_dx ? dx.data() : nullptr, scratch);
    Result result{y.Read(), dx.Read(), {}};
    for (const auto& gradient : gradients) result.gradients.push_back(gradient.Read());
    return result;
  }
};

TEST_P(LstmTest, MatchesTheDefinition) {
  for (const LstmShape& s : std::vector<LstmShape>{{28, 28, 128, false, true, false},
                                                   {7, 5, 65, true, true, true},
                                                   {5, 33, 100, true, false, false},
                                                   {6, 3, 16, false, true, true}}) {
    SCOPED_TRACE(Describe(s));
    const std::vector<int64_t> counts = {1, 5, 16, 23};
    auto lstm = device().MakeLstm(s, counts);
    ASSERT_TRUE(lstm.ok()) << lstm.status();
    for (const int64_t rows : counts) {
      const LstmData d(s, rows);
      const Result result = Run(**lstm, s, d, rows);
      // Sums of in + hidden products of about 1, through a few steps' worth of state.
      EXPECT_TRUE(Near(result.y, Reference(s, ToDoubles(d.x), d.InDouble()), 3e-6)) << rows;
    }
  }
}

// Where a state lies between two bf16, its last bit decides to which it is rounded, which the
// following steps see.
TEST_P(LstmTest, Bf16MatchesTheDefinition) {
  for (LstmShape s : std::vector<LstmShape>{{28, 28, 128, false, true, false},
                                            {7, 5, 65, true, true, true},
                                            {5, 33, 100, true, false, false},
                                            {4, 6, 64, false, true, true},
                                            {3, 5, 130, true, true, true},
                                            {1, 3, 17, false, true, true}}) {
    SCOPED_TRACE(Describe(s));
    s.precision = Precision::kBf16;
    for (const int64_t rows : {1, 5, 16}) {
      auto lstm = device().MakeLstm(s, {rows});
      ASSERT_TRUE(lstm.ok()) << lstm.status();
      const LstmData d(s, rows);
      LstmData rounded = d;
      rounded.x = Rounded(d.x, s.precision);
      for (size_t i = 0; i < rounded.tensors.size(); ++i) {
        if (i % kTensors < 2) rounded.tensors[i] = Rounded(d.tensors[i], s.precision);
      }
      const Result result = Run(**lstm, s, d, rows);
      const Values expected = Reference(s, ToDoubles(rounded.x), rounded.InDouble());
      EXPECT_TRUE(Near(result.y, expected, s.steps == 1 ? 3e-6 : 1e-3));

      // Gradients: those of fp32 but for the rounding of factors.
      LstmShape exact = s;
      exact.precision = Precision::kFp32;
      auto other = device().MakeLstm(exact, {rows});
      ASSERT_TRUE(other.ok()) << other.status();
      const Result wanted = Run(**other, exact, rounded, rows);
      const auto check = [&](const std::vector<float>& a, const std::vector<float>& b) {
        double difference = 0, norm = 0;
        for (size_t i = 0; i < a.size(); ++i) {
          difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
          norm += std::pow(static_cast<double>(b[i]), 2);
        }
        EXPECT_LE(difference, 1e-4 * norm);
      };
      check(result.dx, wanted.dx);
      for (size_t i = 0; i < wanted.gradients.size(); ++i) {
        if (s.bias || i % kTensors < 2) check(result.gradients[i], wanted.gradients[i]);
      }
    }
  }
}

TEST_P(LstmTest, MatchesFiniteDifferences) {
  for (const LstmShape& s : SmallShapes()) {
    SCOPED_TRACE(Describe(s));
    constexpr int64_t kRows = 3;
    const LstmData d(s, kRows);
    auto lstm = device().MakeLstm(s, {kRows});
    ASSERT_TRUE(lstm.ok()) << lstm.status();
    const Result result = Run(**lstm, s, d, kRows);
    const Values x = ToDoubles(d.x);
    const std::vector<Values> tensors = d.InDouble();
    EXPECT_TRUE(MatchesFiniteDifferences(
        [&](const Values& at) { return Dot(Reference(s, at, tensors), d.dy); }, x, result.dx));
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!s.bias && i % kTensors >= 2) continue;
      SCOPED_TRACE("tensor " + std::to_string(i));
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const Values& at) {
            std::vector<Values> moved = tensors;
            moved[i] = at;
            return Dot(Reference(s, x, moved), d.dy);
          },
          tensors[i], result.gradients[i]));
    }
    // The gradients of the tensors do not depend on whether that of x is wanted.
    const Result without = Run(**lstm, s, d, kRows, /*want_dx=*/false);
    for (size_t i = 0; i < tensors.size(); ++i)
      EXPECT_TRUE(SameBits(without.gradients[i], result.gradients[i]));
    for (const float untouched : without.dx) EXPECT_EQ(untouched, 12345.678f);
  }
}

// Gradients at the width that tiles and panels have, along random directions: all elements take
// part.
TEST_P(LstmTest, WideGradientsMatchDirectionalDifferences) {
  for (const LstmShape& s :
       std::vector<LstmShape>{{4, 28, 128, false, true, false}, {3, 9, 70, true, true, true}}) {
    SCOPED_TRACE(Describe(s));
    constexpr int64_t kRows = 13;
    const LstmData d(s, kRows);
    auto lstm = device().MakeLstm(s, {kRows});
    ASSERT_TRUE(lstm.ok()) << lstm.status();
    const Result result = Run(**lstm, s, d, kRows);
    for (size_t i = 0; i <= d.tensors.size(); ++i) {
      SCOPED_TRACE("tensor " + std::to_string(i));
      const bool of_x = i == d.tensors.size();
      const std::vector<float>& gradient = of_x ? result.dx : result.gradients[i];
      for (uint32_t seed = 0; seed < 3; ++seed) {
        const std::vector<float> along = RandomFloats(gradient.size(), 90 + seed);
        const auto at = [&](double h) {
          std::vector<Values> tensors = d.InDouble();
          Values x = ToDoubles(d.x);
          Values& moved = of_x ? x : tensors[i];
          for (size_t k = 0; k < moved.size(); ++k) moved[k] += h * along[k];
          return Dot(Reference(s, x, tensors), d.dy);
        };
        double actual = 0, scale = 0;
        for (size_t k = 0; k < gradient.size(); ++k) {
          actual += static_cast<double>(gradient[k]) * along[k];
          scale += static_cast<double>(gradient[k]) * gradient[k];
        }
        const double expected = (at(1e-5) - at(-1e-5)) / 2e-5;
        EXPECT_NEAR(actual, expected, 2e-5 * (1 + std::sqrt(scale)));
      }
    }
  }
}

TEST_P(LstmTest, RowsDoNotDependOnTheirNumber) {
  for (const LstmShape& s :
       std::vector<LstmShape>{{6, 28, 128, false, true, false},
                              {3, 7, 35, true, true, true},
                              {6, 28, 128, false, true, false, Precision::kBf16},
                              {3, 7, 35, true, true, true, Precision::kBf16}}) {
    SCOPED_TRACE(Describe(s));
    constexpr int64_t kMost = 34;
    const LstmData d(s, kMost);
    std::vector<int64_t> counts(kMost);
    std::iota(counts.begin(), counts.end(), 1);
    auto lstm = device().MakeLstm(s, counts);
    ASSERT_TRUE(lstm.ok()) << lstm.status();
    const Result whole = Run(**lstm, s, d, kMost);
    for (int64_t rows = 1; rows < kMost; ++rows) {
      const Result part = Run(**lstm, s, d, rows);
      const auto head = [](std::vector<float> values, size_t size) {
        values.resize(size);
        return values;
      };
      ASSERT_TRUE(SameBits(part.y, head(whole.y, part.y.size()))) << rows << " rows, forward";
      ASSERT_TRUE(SameBits(part.dx, head(whole.dx, part.dx.size()))) << rows << " rows, gradient";
    }
  }
}

// Also where there are more than a GPU's multiprocessors, which then take several at once.
TEST_P(LstmTest, FewOfManyRowsHaveTheBitsOfAll) {
  for (LstmShape s : std::vector<LstmShape>{{2, 3, 9, false, true, false},
                                            {3, 2, 36, true, false, true},
                                            {2, 4, 65, true, true, false},
                                            {2, 3, 130, false, true, true}}) {
    for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
      s.precision = precision;
      SCOPED_TRACE(Describe(s) + (precision == Precision::kBf16 ? " bf16" : ""));
      constexpr int64_t kAll = 603, kFew = 3;
      auto lstm = device().MakeLstm(s, {kFew, kAll});
      ASSERT_TRUE(lstm.ok()) << lstm.status();
      LstmData d(s, kAll);
      const Result all = Run(**lstm, s, d, kAll);
      for (const int64_t first : {int64_t{0}, int64_t{301}, kAll - kFew}) {
        LstmData few = d;
        const int64_t inputs = s.steps * s.in, outputs = s.outputs();
        few.x.erase(few.x.begin(), few.x.begin() + first * inputs);
        few.dy.erase(few.dy.begin(), few.dy.begin() + first * outputs);
        const Result part = Run(**lstm, s, few, kFew);
        const auto middle = [](const std::vector<float>& values, int64_t begin, size_t size) {
          return std::vector<float>(values.begin() + begin, values.begin() + begin + size);
        };
        EXPECT_TRUE(SameBits(part.y, middle(all.y, first * outputs, part.y.size()))) << first;
        EXPECT_TRUE(SameBits(part.dx, middle(all.dx, first * inputs, part.dx.size()))) << first;
      }
    }
  }
}

// Leaves that are taken together have the bits of each alone: outputs, and gradients wherever they
// lie.
TEST_P(LstmTest, LeavesTogetherAreLeavesApart) {
  const std::vector<std::vector<int64_t>> groups = {{4, 4, 4}, {5, 5, 3, 5}, {3}};
  for (LstmShape s : std::vector<LstmShape>{{6, 28, 64, false, true, false},
                                            {3, 7, 35, true, true, true},
                                            {1, 4, 16, true, false, false},
                                            {3, 7, 35, true, true, true, Precision::kBf16},
                                            {4, 12, 32, false, true, false, Precision::kBf16}}) {
    SCOPED_TRACE(Describe(s));
    s.most_rows = 18;
    auto lstm = device().MakeLstm(s, {3, 4, 5});
    ASSERT_TRUE(lstm.ok()) << lstm.status();
    const int64_t inputs = s.steps * s.in;
    const LstmData d(s, s.most_rows);
    for (const std::vector<int64_t>& group : groups) {
      Leaves leaves;
      leaves.count = static_cast<int>(group.size());
      std::partial_sum(group.begin(), group.end(), leaves.begin + 1);
      const int64_t rows = leaves.total();
      std::vector<Result> apart;
      for (int leaf = 0; leaf < leaves.count; ++leaf) {
        const int64_t first = leaves.begin[leaf];
        LstmData own = d;
        own.x.erase(own.x.begin(), own.x.begin() + first * inputs);
        own.dy.erase(own.dy.begin(), own.dy.begin() + first * s.outputs());
        apart.push_back(Run(**lstm, s, own, group[leaf]));
      }
      const auto x = In(std::vector<float>(d.x.begin(), d.x.begin() + rows * inputs));
      const auto dy = In(std::vector<float>(d.dy.begin(), d.dy.begin() + rows * s.outputs()));
      const auto scratch = Scratch((*lstm)->scratch_bytes());
      const Weights weights = Pack(**lstm, s, d);
      for (const int64_t odd : {0, 1}) {
        SCOPED_TRACE(std::to_string(group.size()) + " leaves" + (odd ? ", unaligned" : ""));
        // A leaf's gradients: the tensors one behind the other, each at a multiple of 4.
        std::vector<int64_t> offsets;
        int64_t stride = 4;
        for (const auto& tensor : d.tensors) {
          offsets.push_back(stride + odd);
          stride += (static_cast<int64_t>(tensor.size()) + 3) / 4 * 4;
        }
        stride += odd;
        const auto flat = Out(leaves.count * stride + odd, Guard::kBefore);
        std::vector<LstmTensors<float>> first(s.directions());
        for (int64_t k = 0; k < s.directions(); ++k) {
          const auto at = [&](int64_t tensor) { return flat + offsets[k * kTensors + tensor]; };
          first[k] = {at(0), at(1), s.bias ? at(2) : nullptr, s.bias ? at(3) : nullptr};
        }
        const auto y = Out(rows * s.outputs()), dx = Out(rows * inputs),
                   reserve = Out(rows * s.reserve());
        for (const bool want_dx : {false, true}) {
          if ((*lstm)->serves_any_rows()) {
            (*lstm)->Forward(stream(), rows, x, y, reserve, scratch);
          } else {
            for (int leaf = 0; leaf < leaves.count; ++leaf) {
              const int64_t row = leaves.begin[leaf];
              (*lstm)->Forward(stream(), group[leaf], x + row * inputs, y + row * s.outputs(),
                               reserve + row * s.reserve(), scratch);
            }
          }
          (*lstm)->BackwardLeaves(stream(), leaves, x, dy, reserve, first, stride,
                                  want_dx ? dx.data() : nullptr, scratch);
          const std::vector<float> outputs = y.Read(), gradients = flat.Read();
          for (int leaf = 0; leaf < leaves.count; ++leaf) {
            const auto part = [](const std::vector<float>& values, int64_t begin, size_t size) {
              return std::vector<float>(values.begin() + begin, values.begin() + begin + size);
            };
            const Result& own = apart[leaf];
            const int64_t row = leaves.begin[leaf];
            EXPECT_TRUE(SameBits(part(outputs, row * s.outputs(), own.y.size()), own.y)) << leaf;
            for (size_t i = 0; i < own.gradients.size(); ++i) {
              EXPECT_TRUE(
                  SameBits(part(gradients, leaf * stride + offsets[i], own.gradients[i].size()),
                           own.gradients[i]))
                  << "leaf " << leaf << ", tensor " << i;
            }
            if (!want_dx) continue;
            EXPECT_TRUE(SameBits(part(dx.Read(), row * inputs, own.dx.size()), own.dx)) << leaf;
          }
        }
      }
    }
  }
}

// Several threads, each with its own stream, reserve and scratch, get the bits of one.
TEST_P(LstmTest, ThreadsAndRepetitionsAgree) {
  const LstmShape s{5, 28, 128, true, true, false};
  constexpr int64_t kRows = 16;
  const LstmData d(s, kRows);
  auto lstm = device().MakeLstm(s, {kRows});
  ASSERT_TRUE(lstm.ok()) << lstm.status();
  const Result expected = Run(**lstm, s, d, kRows);
  const Weights weights = Pack(**lstm, s, d);
  ASSERT_TRUE(stream().Synchronize().ok());  // the threads' streams do not wait for it
  constexpr int kThreads = 4, kRepeats = 3;
  // Inputs, and what each thread has for itself.
  const auto x = In(d.x), dy = In(d.dy);
  struct Own {
    Buffer<float> y, dx, reserve;
    Buffer<char> scratch;
    std::vector<Buffer<float>> gradients;
  };
  std::vector<Own> owns;
  for (int t = 0; t < kThreads; ++t) {
    owns.push_back({Out(d.dy.size()),
                    Out(d.x.size()),
                    Out(kRows * s.reserve()),
                    Scratch((*lstm)->scratch_bytes()),
                    {}});
    for (const auto& tensor : d.tensors) owns.back().gradients.push_back(Out(tensor.size()));
  }
  std::vector<Result> results(kThreads * kRepeats);
  std::vector<absl::Status> statuses(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      auto mine = device().MakeStream();
      if (!mine.ok()) {
        statuses[t] = mine.status();
        return;
      }
      const Own& own = owns[t];
      std::vector<LstmTensors<float>> out(s.directions());
      for (int64_t i = 0; i < s.directions(); ++i) {
        const auto* const g = &own.gradients[i * kTensors];
        out[i] = {g[0], g[1], g[2], g[3]};
      }
      const auto read = [&](const Buffer<float>& from, std::vector<float>& to) {
        to.resize(from.size());
        device().Copy(**mine, from, to.data(), to.size() * sizeof(float));
      };
      for (int k = 0; k < kRepeats; ++k) {
        (*lstm)->Forward(**mine, kRows, x, own.y, own.reserve, own.scratch);
        (*lstm)->Backward(**mine, kRows, x, dy, own.reserve, out, own.dx, own.scratch);
        Result& r = results[t * kRepeats + k];
        r.gradients.resize(d.tensors.size());
        read(own.y, r.y);
        read(own.dx, r.dx);
        for (size_t i = 0; i < d.tensors.size(); ++i) read(own.gradients[i], r.gradients[i]);
        statuses[t].Update((*mine)->Synchronize());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) ASSERT_TRUE(status.ok()) << status;
  for (const Result& r : results) {
    ASSERT_TRUE(SameBits(r.y, expected.y));
    ASSERT_TRUE(SameBits(r.dx, expected.dx));
    for (size_t i = 0; i < r.gradients.size(); ++i)
      ASSERT_TRUE(SameBits(r.gradients[i], expected.gradients[i])) << i;
  }
}

// Saturated gates give no NaN, and a NaN of the input reaches the output.
TEST_P(LstmTest, ExtremeInputs) {
  const LstmShape s{3, 2, 17, false, false, true};
  auto lstm = device().MakeLstm(s, {1});
  ASSERT_TRUE(lstm.ok()) << lstm.status();
  LstmData d(s, 1);
  for (float& value : d.x) value *= 1e30f;
  const Result saturated = Run(**lstm, s, d, 1);
  for (const float value : saturated.y) EXPECT_LE(std::abs(value), 1);
  for (const auto& gradient : saturated.gradients)
    for (const float value : gradient) EXPECT_FALSE(std::isnan(value));
  d.x[0] = std::numeric_limits<float>::quiet_NaN();
  for (const float value : Run(**lstm, s, d, 1).y) EXPECT_TRUE(std::isnan(value));
}

TEST_P(LstmTest, RefusesShapesThatAreNone) {
  for (const LstmShape& s :
       std::vector<LstmShape>{{0, 3, 3}, {3, 0, 3}, {3, 3, 0}, {-1, 3, 3}, {3, 3, -2}}) {
    EXPECT_EQ(device().MakeLstm(s, {1}).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(device().MakeLstm({3, 3, 3}, {2, 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

LOCKSTEP_DEVICE_TESTS(LstmTest);

}  // namespace
}  // namespace lockstep::device
