// CopyStrided against loops as its definition reads.
#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

using CopyTest = DeviceTest;

// Applies `copy` to every element, by index.
template <class Visit>
void ForEachElement(const StridedCopy& copy, int64_t rows, Visit visit) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < copy.size[0]; ++i)
      for (int64_t j = 0; j < copy.size[1]; ++j)
        for (int64_t k = 0; k < copy.size[2]; ++k)
          visit(r * copy.from_row + copy.from_begin + i * copy.from[0] + j * copy.from[1] +
                    k * copy.from[2],
                r * copy.to_row + copy.to_begin + i * copy.to[0] + j * copy.to[1] + k * copy.to[2]);
}

const StridedCopy kCopies[] = {
    // A 4 x 3 x 17 image into the middle of 6 x 5 x 20.
    {.size = {4, 3, 17},
     .from = {51, 17, 1},
     .from_row = 204,
     .to_begin = 121,
     .to = {100, 20, 1},
     .to_row = 600},
    // Every second pixel of 5 x 5 x 33.
    {.size = {3, 3, 33}, .from = {330, 66, 1}, .from_row = 825, .to = {99, 33, 1}, .to_row = 297},
    // 3 x 4 x 5 with its axes turned round.
    {.size = {5, 4, 3}, .from = {1, 5, 20}, .from_row = 60, .to = {12, 3, 1}, .to_row = 60},
    {.size = {3, 4, 5}, .from = {20, 5, 1}, .from_row = 60, .to = {1, 3, 12}, .to_row = 60},
    {.size = {1, 1, 16}, .from = {16, 16, 1}, .from_row = 16, .to = {16, 16, 1}, .to_row = 16},
};

TEST_P(CopyTest, MovesEachElementAndNothingElse) {
  for (const StridedCopy& forward : kCopies) {
    for (const StridedCopy& copy : {forward, forward.Reversed()}) {
      EXPECT_EQ(copy.elements(), forward.elements());
      for (int64_t rows : {0, 1, 3}) {
        for (Guard guard : {Guard::kBehind, Guard::kBefore}) {
          const std::vector<float> from = RandomFloats(rows * copy.from_row, 61);
          const auto x = In(from, guard);
          const auto y = Out(rows * copy.to_row, guard);
          std::vector<float> expected = y.Read();
          ForEachElement(copy, rows, [&](int64_t a, int64_t b) { expected[b] = from[a]; });
          device().CopyStrided(stream(), copy, rows, x, y);
          EXPECT_TRUE(SameBits(y.Read(), expected));
          EXPECT_TRUE(SameBits(x.Read(), from));
        }
      }
    }
  }
}

LOCKSTEP_DEVICE_TESTS(CopyTest);

}  // namespace
}  // namespace lockstep::device
