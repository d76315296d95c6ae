#include "worker/collective/rendezvous.h"

#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"

namespace lockstep::collective {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

RendezvousOptions Options(int rank, bool one_host) {
  RendezvousOptions options;
  options.rank = rank;
  options.members = {{"worker-a", "h0"}, {"worker-b", one_host ? "h0" : "h1"}};
  options.address = rank == 0 ? "127.0.0.1" : "127.0.0.2";
  options.shared_bytes = 4096;
  return options;
}

std::unique_ptr<Rendezvous> Open(const RendezvousOptions& options) {
  auto end = OpenRendezvous(options);
  EXPECT_TRUE(end.ok()) << end.status();
  return *std::move(end);
}

absl::Time Soon() { return absl::Now() + absl::Seconds(30); }

class Hosts : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(OneOrTwo, Hosts, testing::Bool());

TEST_P(Hosts, SilentMemberIsNamed) {
  auto a = Open(Options(0, GetParam())), b = Open(Options(1, GetParam()));
  const auto joined = a->Connect({a->bytes(), b->bytes()}, absl::Now() + absl::Milliseconds(300));
  EXPECT_EQ(joined.status().code(), absl::StatusCode::kUnavailable) << joined.status();
  EXPECT_THAT(std::string(joined.status().message()), HasSubstr("member 1 (worker-b)"));
}

TEST_P(Hosts, AnAbortEndsConnecting) {
  auto a = Open(Options(0, GetParam())), b = Open(Options(1, GetParam()));
  const absl::Time began = absl::Now();
  const auto joined = a->Connect({a->bytes(), b->bytes()}, Soon(), [began] {
    return absl::Now() < began + absl::Milliseconds(100) ? absl::OkStatus()
                                                         : absl::AbortedError("the job is over");
  });
  EXPECT_EQ(joined.status(), absl::AbortedError("the job is over"));
  EXPECT_LT(absl::Now() - began, absl::Seconds(10));
}

TEST_P(Hosts, MemberThatIsGoneIsNamed) {
  for (const int gone : {0, 1}) {  // whichever end connects and whichever listens
    std::string bytes[2];
    std::unique_ptr<Rendezvous> ends[2];
    for (const int rank : {0, 1}) {
      ends[rank] = Open(Options(rank, GetParam()));
      bytes[rank] = ends[rank]->bytes();
    }
    ends[gone].reset();
    const auto joined =
        ends[1 - gone]->Connect({bytes[0], bytes[1]}, absl::Now() + absl::Milliseconds(300));
    EXPECT_FALSE(joined.ok());
    EXPECT_THAT(std::string(joined.status().message()),
                HasSubstr("member " + std::to_string(gone) + " (worker-"));
  }
}

TEST_P(Hosts, BytesOfAnEarlierRendezvousAreRefused) {
  // Member 1 opened twice, and member 0 was given its first announcement while the second is live.
  auto a = Open(Options(0, GetParam()));
  auto stale = Open(Options(1, GetParam()));
  auto b = Open(Options(1, GetParam()));
  absl::Status second;
  std::thread other([&] {
    second = b->Connect({a->bytes(), b->bytes()}, absl::Now() + absl::Milliseconds(500)).status();
  });
  const auto joined =
      a->Connect({a->bytes(), stale->bytes()}, absl::Now() + absl::Milliseconds(500));
  other.join();
  EXPECT_FALSE(joined.ok());
  EXPECT_THAT(std::string(joined.status().message()), HasSubstr("worker-b"));
}

TEST_P(Hosts, DamagedAndForeignBytesAreRefused) {
  auto b = Open(Options(1, GetParam()));
  const auto refusal = [&](const std::function<void(std::vector<std::string>*)>& change) {
    auto a = Open(Options(0, GetParam()));
    std::vector<std::string> bytes = {a->bytes(), b->bytes()};
    change(&bytes);
    return a->Connect(bytes, Soon()).status();
  };
  const auto expect = [](const absl::Status& status, absl::StatusCode code,
                         const std::string& text) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  expect(refusal([](auto* all) { all->pop_back(); }), absl::StatusCode::kInvalidArgument,
         "bytes of 1 members, expected 2");
  expect(refusal([](auto* all) { (*all)[1].clear(); }), absl::StatusCode::kInvalidArgument,
         "member 1 (worker-b) are damaged");
  expect(refusal([](auto* all) { (*all)[1].pop_back(); }), absl::StatusCode::kInvalidArgument,
         "member 1 (worker-b) are damaged");
  expect(refusal([](auto* all) { (*all)[1] += "x"; }), absl::StatusCode::kInvalidArgument,
         "member 1 (worker-b) are damaged");
  for (size_t i = 0; i < b->bytes().size(); i += 5) {
    expect(refusal([i](auto* all) { (*all)[1][i] ^= 0x10; }), absl::StatusCode::kInvalidArgument,
           "member 1 (worker-b) are damaged");
  }
  expect(refusal([](auto* all) { std::swap((*all)[0], (*all)[1]); }),
         absl::StatusCode::kFailedPrecondition, "member 0 (worker-a) are not those");
  expect(refusal([](auto* all) { (*all)[1] = (*all)[0]; }), absl::StatusCode::kFailedPrecondition,
         "member 1 (worker-b) are of another rendezvous");
  RendezvousOptions renamed = Options(1, GetParam());
  renamed.members[0].name = "worker-c";
  auto foreign = Open(renamed);
  expect(refusal([&](auto* all) { (*all)[1] = foreign->bytes(); }),
         absl::StatusCode::kFailedPrecondition, "member 1 (worker-b) are of another rendezvous");
}

TEST(Rendezvous, DifferentSizesOfSharedMemoryAreRefused) {
  auto a = Open(Options(0, true));
  RendezvousOptions larger = Options(1, true);
  larger.shared_bytes = 8192;
  auto b = Open(larger);
  const auto joined = a->Connect({a->bytes(), b->bytes()}, Soon());
  EXPECT_THAT(std::string(joined.status().message()),
              AllOf(HasSubstr("worker-b) shares 8192 bytes"), HasSubstr("4096")));
}

TEST(Rendezvous, ConnectsOnce) {
  auto options = Options(0, true);
  options.members.pop_back();
  auto alone = Open(options);
  EXPECT_TRUE(alone->Connect({alone->bytes()}, Soon()).ok());
  EXPECT_EQ(alone->Connect({alone->bytes()}, Soon()).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(Rendezvous, BadOptionsAreNamed) {
  RendezvousOptions options = Options(0, false);
  options.address = "localhost";
  EXPECT_THAT(std::string(OpenRendezvous(options).status().message()), HasSubstr("\"localhost\""));
  options.address = "192.0.2.1";  // TEST-NET-1: nobody's
  EXPECT_THAT(std::string(OpenRendezvous(options).status().message()),
              HasSubstr("cannot listen on 192.0.2.1: "));
  options.rank = 2;
  EXPECT_EQ(OpenRendezvous(options).status().code(), absl::StatusCode::kInvalidArgument);
}

int OpenDescriptors() {
  int count = 0;
  DIR* folder = opendir("/proc/self/fd");
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

TEST_P(Hosts, GenerationAfterGenerationLeavesNoDescriptor) {
  int before = 0;
  for (int generation = 0; generation < 12; ++generation) {
    if (generation == 2) before = OpenDescriptors();  // after what libraries open once
    auto a = Open(Options(0, GetParam())), b = Open(Options(1, GetParam()));
    const std::vector<std::string> bytes = {a->bytes(), b->bytes()};
    absl::Notification joined[2];
    const auto live = [&](int rank, Rendezvous& end) {
      const auto communicator = end.Connect(bytes, Soon());
      EXPECT_TRUE(communicator.ok()) << communicator.status();
      // An abort would end the other's Connect.
      joined[rank].Notify();
      joined[1 - rank].WaitForNotification();
      if (generation % 2 == 0 && communicator.ok()) {
        (*communicator)->Abort(absl::CancelledError("next generation"));
      }
    };
    std::thread other([&] { live(1, *b); });
    live(0, *a);
    other.join();
  }
  // A thread that is ending may close the last ones a moment later.
  const absl::Time deadline = absl::Now() + absl::Seconds(5);
  while (OpenDescriptors() > before && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_LE(OpenDescriptors(), before);
}

}  // namespace
}  // namespace lockstep::collective
