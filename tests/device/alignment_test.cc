// A kernel that takes several elements at once where they lie right gives the same bits where they
// do not. Shapes are of the kind that is taken by four, and large enough for every path.
#include <functional>
#include <numeric>
#include <string>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

class AlignmentTest : public DeviceTest {
 protected:
  // Tensors of one call, each at some offset from where memory is aligned.
  struct Call {
    std::vector<std::vector<float>> inputs;
    std::vector<size_t> outputs;  // sizes
    std::function<void(const std::vector<float*>& in, const std::vector<float*>& out)> run;
  };

  std::vector<std::vector<float>> ResultsAt(const Call& call, const std::vector<int>& offsets) {
    std::vector<Buffer<float>> in, out;
    std::vector<float*> in_at, out_at;
    size_t next = 0;
    for (const auto& values : call.inputs) {
      const int offset = offsets[next++ % offsets.size()];
      std::vector<float> shifted(offset, 0.0f);
      shifted.insert(shifted.end(), values.begin(), values.end());
      in.push_back(In(shifted, Guard::kBefore));
      in_at.push_back(in.back() + offset);
    }
    for (const size_t size : call.outputs) {
      const int offset = offsets[next++ % offsets.size()];
      out.push_back(Out(offset + size, Guard::kBefore));
      out_at.push_back(out.back() + offset);
    }
    call.run(in_at, out_at);
    std::vector<std::vector<float>> results;
    for (size_t i = 0; i < out.size(); ++i) {
      const std::vector<float> all = out[i].Read();
      const size_t offset = all.size() - call.outputs[i];
      for (size_t k = 0; k < offset; ++k) EXPECT_EQ(all[k], 12345.678f) << "before the output";
      results.emplace_back(all.begin() + static_cast<int64_t>(offset), all.end());
    }
    return results;
  }

  void Check(const std::string& name, const Call& call) {
    const auto expected = ResultsAt(call, {0});
    for (const std::vector<int>& offsets :
         std::vector<std::vector<int>>{{1}, {3}, {1, 2, 3, 0}, {0, 0, 1}, {2, 0}}) {
      const auto actual = ResultsAt(call, offsets);
      for (size_t i = 0; i < actual.size(); ++i) {
        EXPECT_TRUE(SameBits(actual[i], expected[i])) << name << ", output " << i;
      }
    }
  }
};

TEST_P(AlignmentTest, Elementwise) {
  for (const int64_t n : {1, 4, 7, 64, 5003}) {
    const Call maps = {{RandomFloats(n, 1, -4, 4), RandomFloats(n, 2)},
                       std::vector<size_t>(3, static_cast<size_t>(n)),
                       [&](auto& in, auto& out) {
                         device().TanhForward(stream(), n, in[0], out[0]);
                         device().EluBackward(stream(), n, 0.5f, in[0], in[1], out[1]);
                         device().Multiply(stream(), n, in[0], in[1], out[2]);
                       }};
    Check("maps of " + std::to_string(n), maps);
    StepScalars scalars;
    scalars.step = 3;
    auto memory = device().AllocateHostVisible(sizeof(scalars));
    ASSERT_TRUE(memory.ok()) << memory.status();
    std::memcpy((*memory)->data(), &scalars, sizeof(scalars));
    const auto* const pinned = static_cast<const StepScalars*>((*memory)->data());
    for (const uint64_t first : {0, 1, 6}) {
      const Call dropout = {
          {RandomFloats(n, 3)}, {static_cast<size_t>(n)}, [&](auto& in, auto& out) {
            device().Dropout(stream(), n, in[0], 0.4f, MakePhiloxKey(1, "d"), pinned, first,
                             out[0]);
          }};
      Check("dropout of " + std::to_string(n), dropout);
    }
  }
}

TEST_P(AlignmentTest, Pooling) {
  for (const PoolShape& s : std::vector<PoolShape>{
           {.height = 6, .width = 8, .channels = 12, .kernel = 2, .stride = 2},
           {.height = 9, .width = 7, .channels = 4, .kernel = 3, .stride = 2, .padding = 1},
           {.height = 9, .width = 9, .channels = 8, .kernel = 5, .stride = 2, .padding = 2}}) {
    constexpr int64_t kRows = 3;
    const size_t in_size = kRows * s.height * s.width * s.channels,
                 out_size = kRows * s.out_height() * s.out_width() * s.channels;
    const Call call = {{RandomFloats(in_size, 4), RandomFloats(out_size, 5)},
                       {out_size, in_size, out_size, in_size},
                       [&](auto& in, auto& out) {
                         const auto argmax = OutOf<uint8_t>(out_size);
                         device().MaxPoolForward(stream(), s, kRows, in[0], out[0], argmax);
                         device().MaxPoolBackward(stream(), s, kRows, in[1], argmax, out[1]);
                         device().AveragePoolForward(stream(), s, kRows, in[0], out[2]);
                         device().AveragePoolBackward(stream(), s, kRows, in[1], out[3]);
                         EXPECT_TRUE(stream().Synchronize().ok());
                       }};
    Check("pooling", call);
  }
  for (const auto& [spatial, channels] :
       std::vector<std::pair<int64_t, int64_t>>{{49, 256}, {64, 64}, {1000, 4}, {5, 20}}) {
    constexpr int64_t kRows = 2;
    const size_t in_size = kRows * spatial * channels, out_size = kRows * channels;
    const Call call = {
        {RandomFloats(in_size, 6), RandomFloats(out_size, 7)},
        {out_size, in_size},
        [&, spatial = spatial, channels = channels](auto& in, auto& out) {
          device().GlobalAveragePoolForward(stream(), kRows, spatial, channels, in[0], out[0]);
          device().GlobalAveragePoolBackward(stream(), kRows, spatial, channels, in[1], out[1]);
        }};
    Check("global average of " + std::to_string(spatial), call);
  }
}

TEST_P(AlignmentTest, Features) {
  for (const int64_t features : {4, 40, 128, 1024, 1028, 2500}) {
    constexpr int64_t kRows = 11;
    const size_t size = kRows * features;
    const size_t columns = static_cast<size_t>(features);
    const Call call = {{RandomFloats(size, 8, -3, 3), RandomFloats(size, 9),
                        RandomFloats(columns, 10), RandomFloats(columns, 11)},
                       {size, size, size, size, columns, columns, 2 * kRows},
                       [&](auto& in, auto& out) {
                         device().SoftmaxForward(stream(), kRows, features, in[0], out[0]);
                         device().SoftmaxBackward(stream(), kRows, features, in[0], in[1], out[1]);
                         device().LayerNormForward(stream(), kRows, features, in[0], 1e-5f, in[2],
                                                   in[3], out[2], out[6]);
                         device().LayerNormBackward(stream(), kRows, features, in[0], out[6], in[2],
                                                    in[1], out[3]);
                         device().LayerNormBackwardWeight(stream(), kRows, features, in[0], out[6],
                                                          in[1], out[4], out[5]);
                       }};
    Check(std::to_string(features) + " features", call);
  }
}

TEST_P(AlignmentTest, Embedding) {
  constexpr int64_t kPositions = 150, kVocabulary = 9;
  std::vector<float> positions(kPositions);
  for (int64_t p = 0; p < kPositions; ++p) positions[p] = static_cast<float>(p * p % 7 % 5);
  for (const int64_t features : {4, 132}) {
    const size_t size = kPositions * features, table = kVocabulary * features;
    const Call call = {{RandomFloats(table, 12), RandomFloats(size, 13), positions},
                       {size, table},
                       [&](auto& in, auto& out) {
                         device().EmbeddingForward(stream(), kPositions, kVocabulary, features,
                                                   in[2], in[0], out[0]);
                         device().EmbeddingBackward(stream(), kPositions, kVocabulary, features,
                                                    in[2], in[1], out[1]);
                       }};
    Check("embedding", call);
  }
}

// What a leaf gets among others it gets alone; empty leaves get zeros.
TEST_P(AlignmentTest, LeavesDoNotSeeEachOther) {
  constexpr int64_t kVocabulary = 6;
  for (const int64_t features : {5, 8}) {
    const std::vector<int64_t> sizes = {70, 1, 0, 33, 300};
    Leaves leaves;
    leaves.count = static_cast<int>(sizes.size());
    std::partial_sum(sizes.begin(), sizes.end(), leaves.begin + 1);
    const int64_t n = leaves.total(), stride = kVocabulary * features + 3;
    std::vector<float> positions(n);
    for (int64_t p = 0; p < n; ++p) positions[p] = static_cast<float>(p * 31 % 11 % kVocabulary);
    const auto x = In(RandomFloats(n * features, 14)), dy = In(RandomFloats(n * features, 15)),
               stats = In(RandomFloats(2 * n, 16, 0.5f, 1)), at = In(positions);
    const auto table = Out(leaves.count * stride), dweight = Out(leaves.count * stride),
               dbias = Out(leaves.count * stride);
    device().EmbeddingBackward(stream(), leaves, kVocabulary, features, at, dy, table, stride);
    device().LayerNormBackwardWeight(stream(), leaves, features, x, stats, dy, dweight, dbias,
                                     stride);
    const auto one_table = Out(leaves.count * stride), one_dweight = Out(leaves.count * stride),
               one_dbias = Out(leaves.count * stride);
    for (int l = 0; l < leaves.count; ++l) {
      const int64_t first = leaves.begin[l];
      device().EmbeddingBackward(stream(), sizes[l], kVocabulary, features, at + first,
                                 dy + first * features, one_table + l * stride);
      device().LayerNormBackwardWeight(stream(), sizes[l], features, x + first * features,
                                       stats + 2 * first, dy + first * features,
                                       one_dweight + l * stride, one_dbias + l * stride);
    }
    EXPECT_TRUE(SameBits(table.Read(), one_table.Read())) << features;
    EXPECT_TRUE(SameBits(dweight.Read(), one_dweight.Read())) << features;
    EXPECT_TRUE(SameBits(dbias.Read(), one_dbias.Read())) << features;
    for (int64_t i = 0; i < features; ++i) {
      EXPECT_EQ(dweight.Read()[2 * stride + i], 0.0f);
      EXPECT_EQ(table.Read()[2 * stride + i], 0.0f);
    }
  }
}

LOCKSTEP_DEVICE_TESTS(AlignmentTest);

}  // namespace
}  // namespace lockstep::device
