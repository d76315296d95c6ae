#include "worker/train/run_ahead.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace lockstep::train {
namespace {

using testing::ElementsAre;
using Word = RunAhead::Word;

// Mark m is behind step m.
class FakeStream : public device::Stream {
 public:
  absl::Status Synchronize() override { return absl::InternalError("not to be called"); }
  int64_t Mark() override { return ++marks_; }
  absl::Status WaitFor(int64_t mark) override {
    waits.push_back(mark);
    return outcome;
  }
  std::vector<int64_t> waits;
  absl::Status outcome;

 private:
  int64_t marks_ = 0;
};

// The steps that are waited for in the first `steps`, with at most `most` ahead.
std::vector<int64_t> WaitsOf(int64_t steps, uint8_t most) {
  RunAhead ahead;
  const Word word = {0, most};
  ahead.Agree({&word, 1});
  FakeStream stream;
  int64_t known = 0;
  for (int64_t step = 1; step <= steps; ++step) {
    known = ahead.Enqueued(stream, step, known).value();
    EXPECT_LT(step - known, most);
    EXPECT_LT(known, step) << "the device has nothing to do";
  }
  return stream.waits;
}

TEST(RunAheadTest, WaitsForHalfOfWhatIsAhead) {
  EXPECT_THAT(WaitsOf(5, 2), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(WaitsOf(6, 3), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(WaitsOf(9, 5), ElementsAre(2, 4, 6));
  EXPECT_THAT(WaitsOf(20, 8), ElementsAre(4, 8, 12, 16));
}

TEST(RunAheadTest, MembersHaveTheLeastOfWhatEachTakes) {
  const std::vector<Word> words = {{0, 8}, {0, 3}, {0, 5}};
  RunAhead ahead;
  FakeStream stream;
  int64_t known = 0;
  // Before they have agreed, as few as can be.
  for (int64_t step = 1; step <= 3; ++step) known = ahead.Enqueued(stream, step, known).value();
  EXPECT_THAT(stream.waits, ElementsAre(1, 2));
  EXPECT_FALSE(ahead.Agree(words));
  for (int64_t step = 4; step <= 7; ++step) known = ahead.Enqueued(stream, step, known).value();
  EXPECT_THAT(stream.waits, ElementsAre(1, 2, 3, 4, 5));
  // What no device says.
  EXPECT_FALSE(ahead.Agree(std::vector<Word>{{0, 200}, {0, 8}}));
  for (int64_t step = 8; step <= 14; ++step) known = ahead.Enqueued(stream, step, known).value();
  EXPECT_THAT(stream.waits, ElementsAre(1, 2, 3, 4, 5, 9));
  EXPECT_FALSE(ahead.Agree(std::vector<Word>{{0, 0}, {0, 8}}));
  EXPECT_EQ(ahead.Enqueued(stream, 15, known).value(), 14);  // fewer than were ahead
}

TEST(RunAheadTest, AllStopWhereOneIsToldTo) {
  RunAhead ahead;
  EXPECT_FALSE(ahead.Agree(std::vector<Word>{{0, 8}, {0, 8}}));
  EXPECT_TRUE(ahead.Agree(std::vector<Word>{{0, 8}, {1, 8}}));
  EXPECT_TRUE(ahead.Agree(std::vector<Word>{{1, 2}, {0, 8}}));
}

TEST(RunAheadTest, KeepsWhatIsKnownOfTheLastSteps) {
  RunAhead ahead;
  for (int64_t step = 5; step < 5 + RunAhead::kMost; ++step) ahead.Of(step) = {step, false, true};
  for (int64_t step = 5; step < 5 + RunAhead::kMost; ++step) {
    EXPECT_EQ(ahead.Of(step).samples, step);
  }
}

TEST(RunAheadTest, FailsAsTheStreamDoes) {
  RunAhead ahead;
  FakeStream stream;
  stream.outcome = absl::InternalError("the device is lost");
  EXPECT_EQ(ahead.Enqueued(stream, 1, 0).value(), 0);
  EXPECT_EQ(ahead.Enqueued(stream, 2, 0).status(), stream.outcome);
}

}  // namespace
}  // namespace lockstep::train
