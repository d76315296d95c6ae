// The main function of tests on the emulated GPU. With --gtest_repeat blocks, threads and streams
// run in another order each time, and every test must read the same bits from the device.
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/gpu/emulator/emulator.h"

namespace {

using lockstep::emulator::Count;
using lockstep::emulator::Order;

class Orders : public testing::EmptyTestEventListener {
 public:
  // At first that of the environment.
  void OnTestIterationStart(const testing::UnitTest&, int iteration) override {
    if (iteration == 1) lockstep::emulator::SetOrder({Order::Kind::kReversed});
    if (iteration > 1) {
      lockstep::emulator::SetOrder({Order::Kind::kPermuted, static_cast<uint64_t>(iteration)});
    }
  }
  void OnTestStart(const testing::TestInfo&) override { read_before_ = Count().read; }
  void OnTestEnd(const testing::TestInfo& test) override {
    const uint64_t read = Count().read - read_before_;
    const std::string name = absl::StrCat(test.test_suite_name(), ".", test.name());
    const auto [first, added] = read_.emplace(name, read);
    EXPECT_EQ(first->second, read) << "the order of blocks, threads or streams has changed bits";
  }

 private:
  uint64_t read_before_ = 0;
  std::map<std::string, uint64_t> read_;  // by each test
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::UnitTest::GetInstance()->listeners().Append(new Orders);
  return RUN_ALL_TESTS();
}
