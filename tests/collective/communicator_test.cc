// The operations of Communicator by closed form, on every kind of link: threads, shared memory
// between mappings of one process, Gloo, and a mix.
#include "worker/collective/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <string.h>

#include <atomic>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "worker/collective/rendezvous.h"

namespace lockstep::collective {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr size_t kShared = 8 << 20;

absl::Time Soon() { return absl::Now() + absl::Minutes(1); }

enum class Link { kThreads, kShared, kGloo, kMixed };

// The members of one generation.
std::vector<std::unique_ptr<Communicator>> Join(Link link, int size) {
  if (link == Link::kThreads) return MakeLocalCommunicators(size, kShared);
  const int hosts = link == Link::kShared ? 1 : link == Link::kGloo ? size : 2;
  RendezvousOptions options;
  options.shared_bytes = kShared;
  for (int rank = 0; rank < size; ++rank) {
    options.members.push_back(
        {"worker-" + std::to_string(rank), "host" + std::to_string(rank % hosts)});
  }
  std::vector<std::unique_ptr<Rendezvous>> ends;
  std::vector<std::string> bytes;
  for (int rank = 0; rank < size; ++rank) {
    options.rank = rank;
    options.address = "127.0.0." + std::to_string(rank % hosts + 1);
    auto end = OpenRendezvous(options);
    EXPECT_TRUE(end.ok()) << end.status();
    bytes.push_back((*end)->bytes());
    ends.push_back(*std::move(end));
  }
  std::vector<std::unique_ptr<Communicator>> communicators(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      auto communicator = ends[rank]->Connect(bytes, Soon());
      EXPECT_TRUE(communicator.ok()) << communicator.status();
      communicators[rank] = *std::move(communicator);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return communicators;
}

// Runs one thread for each member; each destroys its communicator, as processes do.
void OnMembers(Link link, int size, const std::function<void(Communicator&)>& body) {
  auto communicators = Join(link, size);
  ASSERT_EQ(communicators.size(), static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (auto& communicator : communicators) {
    threads.emplace_back([&body, own = std::move(communicator)]() mutable {
      body(*own);
      own.reset();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

class Links : public testing::TestWithParam<Link> {};
std::string LinkName(const testing::TestParamInfo<Link>& link) {
  constexpr const char* kNames[] = {"Threads", "Shared", "Gloo", "Mixed"};
  return kNames[static_cast<int>(link.param)];
}
INSTANTIATE_TEST_SUITE_P(All, Links,
                         testing::Values(Link::kThreads, Link::kShared, Link::kGloo, Link::kMixed),
                         LinkName);

TEST(Chunks, PartitionAtMultiplesOfSixteen) {
  for (const int64_t count : {0, 1, 15, 16, 17, 1000, 1 << 20}) {
    for (int size = 1; size <= 9; ++size) {
      EXPECT_EQ(ChunkBegin(count, size, 0), 0);
      EXPECT_EQ(ChunkBegin(count, size, size), count);
      for (int rank = 0; rank < size; ++rank) {
        const int64_t begin = ChunkBegin(count, size, rank);
        const int64_t end = ChunkBegin(count, size, rank + 1);
        EXPECT_LE(begin, end);
        EXPECT_TRUE(begin % 16 == 0 || begin == count);
        EXPECT_LE(end - begin, count / size + 32);
      }
    }
  }
}

TEST_P(Links, ExchangeOffersPartsAndGatherCollectsChunks) {
  for (const int size : {1, 2, 5}) {
    OnMembers(GetParam(), size, [size](Communicator& c) {
      constexpr int64_t kCount = 1000;
      // Member m offers m parts, so the first offers none; value = 1000 m + 100 part + step +
      // index.
      std::vector<int> parts(size);
      std::iota(parts.begin(), parts.end(), 0);
      const int rank = c.rank();
      std::vector<float*> buffers;
      for (int part = 0; part < rank; ++part) {
        buffers.push_back(static_cast<float*>(*c.Allocate(kCount * sizeof(float))));
      }
      for (int part = rank; part < size; ++part) (void)c.Allocate(kCount * sizeof(float));
      auto* data = static_cast<float*>(*c.Allocate(kCount * sizeof(float)));
      const int64_t begin = ChunkBegin(kCount, size, rank),
                    end = ChunkBegin(kCount, size, rank + 1);
      for (int step = 0; step < 20; ++step) {
        for (int part = 0; part < rank; ++part) {
          for (int64_t i = 0; i < kCount; ++i)
            buffers[part][i] = 1000 * rank + 100 * part + step + i;
        }
        std::vector<std::vector<const float*>> views;
        const auto exchange = c.EnqueueExchange(
            nullptr, Lane::kGradients, std::vector<const float*>(buffers.begin(), buffers.end()),
            parts, kCount, &views);
        ASSERT_TRUE(exchange.ok()) << exchange.status();
        const absl::Status waited = c.Wait(*exchange, Soon());
        ASSERT_TRUE(waited.ok()) << waited;
        ASSERT_EQ(views.size(), static_cast<size_t>(size));
        for (int64_t i = begin; i < end; ++i) data[i] = 0;
        for (int m = 0; m < size; ++m) {
          ASSERT_EQ(views[m].size(), static_cast<size_t>(m));
          for (int part = 0; part < m; ++part) {
            for (int64_t i = begin; i < end; ++i) {
              ASSERT_EQ(views[m][part][i - begin], 1000 * m + 100 * part + step + i);
            }
          }
        }
        for (int64_t i = begin; i < end; ++i) data[i] = 7 * i + rank + step;
        const auto gather = c.EnqueueGather(nullptr, Lane::kGradients, data, kCount);
        ASSERT_TRUE(gather.ok()) << gather.status();
        ASSERT_TRUE(c.Wait(*gather, Soon()).ok());
        for (int m = 0; m < size; ++m) {
          for (int64_t i = ChunkBegin(kCount, size, m); i < ChunkBegin(kCount, size, m + 1); ++i) {
            ASSERT_EQ(data[i], 7 * i + m + step);
          }
        }
      }
    });
  }
}

TEST_P(Links, ManyOperationsMayBeOutstanding) {
  // More all-gathers than there is staging memory, waited for in the end.
  OnMembers(GetParam(), 3, [](Communicator& c) {
    constexpr int kOperations = 40;
    std::vector<uint64_t> mine(kOperations);
    std::vector<std::vector<uint64_t>> all(kOperations, std::vector<uint64_t>(3));
    Ticket last;
    for (int i = 0; i < kOperations; ++i) {
      mine[i] = 100 * c.rank() + i;
      const auto ticket =
          c.EnqueueAllGather(nullptr, Lane::kMoments, &mine[i], sizeof(uint64_t), all[i].data());
      ASSERT_TRUE(ticket.ok());
      last = *ticket;
    }
    const absl::Status status = c.Wait(last, Soon());
    ASSERT_TRUE(status.ok()) << status;
    for (uint64_t i = 0; i < kOperations; ++i) {
      EXPECT_THAT(all[i], testing::ElementsAre(i, 100 + i, 200 + i));
    }
  });
}

TEST(Communicator, DescriptorsAreReusedInOrder) {
  for (const Link link : {Link::kThreads, Link::kShared}) {
    OnMembers(link, 2, [](Communicator& c) {
      for (int i = 0; i < 2000; ++i) {  // several times round the ring of descriptors
        const int mine = 3 * i + c.rank();
        int all[2] = {};
        const auto ticket = c.EnqueueAllGather(nullptr, Lane::kGradients, &mine, sizeof(mine), all);
        ASSERT_TRUE(ticket.ok());
        ASSERT_TRUE(c.Wait(*ticket, Soon()).ok());
        ASSERT_EQ(all[0], 3 * i);
        ASSERT_EQ(all[1], 3 * i + 1);
      }
    });
  }
}

TEST_P(Links, AllGatherUpToItsLargestSize) {
  OnMembers(GetParam(), 2, [](Communicator& c) {
    const std::vector<char> mine(Communicator::kSmallBytes, static_cast<char>('a' + c.rank()));
    std::vector<char> all(2 * mine.size());
    const auto ticket =
        c.EnqueueAllGather(nullptr, Lane::kMoments, mine.data(), mine.size(), all.data());
    ASSERT_TRUE(ticket.ok());
    ASSERT_TRUE(c.Wait(*ticket, Soon()).ok());
    EXPECT_EQ(all[mine.size() - 1], 'a');
    EXPECT_EQ(all[mine.size()], 'b');
    EXPECT_EQ(all.back(), 'b');
    EXPECT_EQ(c.EnqueueAllGather(nullptr, Lane::kMoments, mine.data(), mine.size() + 1, all.data())
                  .status()
                  .code(),
              absl::StatusCode::kInvalidArgument);
  });
}

TEST_P(Links, BroadcastFromEveryRootOfAnySize) {
  for (const int size : {1, 3, 4}) {
    OnMembers(GetParam(), size, [size](Communicator& c) {
      for (const size_t bytes : {size_t{0}, size_t{1}, size_t{1} << 20, (size_t{5} << 20) + 3}) {
        for (int root = 0; root < size; ++root) {
          std::vector<uint8_t> data(bytes);
          if (c.rank() == root) {
            for (size_t i = 0; i < bytes; ++i)
              data[i] = static_cast<uint8_t>(i * 31 + root + (i >> 16));
          }
          const auto ticket =
              c.EnqueueBroadcast(nullptr, Lane::kGradients, root, data.data(), bytes);
          ASSERT_TRUE(ticket.ok());
          const absl::Status status = c.Wait(*ticket, Soon());
          ASSERT_TRUE(status.ok()) << status;
          for (size_t i = 0; i < bytes; ++i) {
            ASSERT_EQ(data[i], static_cast<uint8_t>(i * 31 + root + (i >> 16)));
          }
        }
      }
      const uint64_t all = 1 + (uint64_t{1} << 20) + (uint64_t{5} << 20) + 3;  // as root
      EXPECT_EQ(c.traffic().broadcast_bytes, all * (size - 1));
    });
  }
}

TEST_P(Links, LanesAreIndependent) {
  // The members wait for the lanes in opposite orders.
  OnMembers(GetParam(), 2, [](Communicator& c) {
    int mine = c.rank(), all[2][2] = {};
    const auto first = c.EnqueueAllGather(nullptr, Lane::kGradients, &mine, sizeof(mine), all[0]);
    const auto second = c.EnqueueAllGather(nullptr, Lane::kMoments, &mine, sizeof(mine), all[1]);
    ASSERT_TRUE(first.ok() && second.ok());
    ASSERT_TRUE(c.Wait(c.rank() == 0 ? *first : *second, Soon()).ok());
    ASSERT_TRUE(c.Wait(c.rank() == 0 ? *second : *first, Soon()).ok());
    EXPECT_EQ(all[0][1], 1);
    EXPECT_EQ(all[1][1], 1);
  });
}

// ---- failures

// One operation of all. From then on every member has read what its peers said while they
// connected, and a goodbye is one write, which gets through before the connection is closed.
void Meet(std::vector<std::unique_ptr<Communicator>>& communicators) {
  const size_t size = communicators.size();
  std::vector<char> mine(size), all(size * size);
  std::vector<Ticket> tickets;
  for (size_t rank = 0; rank < size; ++rank) {
    tickets.push_back(*communicators[rank]->EnqueueAllGather(nullptr, Lane::kGradients, &mine[rank],
                                                             1, &all[rank * size]));
  }
  for (size_t rank = 0; rank < size; ++rank) {
    const absl::Status status = communicators[rank]->Wait(tickets[rank], Soon());
    EXPECT_TRUE(status.ok()) << status;
  }
}

TEST_P(Links, DeadlineNamesTheMembersAndTheLaneAndIsFinal) {
  auto communicators = Join(GetParam(), 3);
  Meet(communicators);
  Communicator& c = *communicators[0];
  char mine = 0, all[3];
  const auto ticket = c.EnqueueAllGather(nullptr, Lane::kMoments, &mine, 1, all);
  const absl::Status status = c.Wait(*ticket, absl::Now() + absl::Milliseconds(100));
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("no answer from member "), HasSubstr("on lane moments"),
                    Not(HasSubstr("member 0"))));
  EXPECT_EQ(c.Wait(*ticket, Soon()), status);
  // The others are told, and blame neither us nor each other for what they did not do.
  const auto later = communicators[1]->EnqueueAllGather(nullptr, Lane::kGradients, &mine, 1, all);
  const absl::Status heard = communicators[1]->Wait(*later, Soon());
  EXPECT_EQ(heard.code(), absl::StatusCode::kAborted) << heard;
  EXPECT_THAT(std::string(heard.message()), HasSubstr("gave up"));
}

// Where links are mixed, those of one kind.
TEST(Communicator, DeadlineNamesAllWhoAreMissing) {
  for (const Link link : {Link::kThreads, Link::kShared, Link::kGloo}) {
    auto communicators = Join(link, 4);
    char mine[4] = {}, all[4][4];
    std::vector<Ticket> tickets;
    for (const int rank : {0, 2}) {
      tickets.push_back(*communicators[rank]->EnqueueAllGather(nullptr, Lane::kGradients,
                                                               &mine[rank], 1, all[rank]));
    }
    // Until then member 2's byte must be here, which Gloo carries on threads of its own.
    const absl::Duration patience =
        link == Link::kGloo ? absl::Seconds(2) : absl::Milliseconds(300);
    const absl::Status status = communicators[0]->Wait(tickets[0], absl::Now() + patience);
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("member 1"), HasSubstr("member 3"), Not(HasSubstr("member 2"))));
  }
}

TEST_P(Links, AbortWakesAWaitHereWithTheFirstCause) {
  auto communicators = Join(GetParam(), 2);
  char mine = 0, all[2];
  const auto ticket = communicators[0]->EnqueueAllGather(nullptr, Lane::kGradients, &mine, 1, all);
  absl::Status status;
  std::thread waiting([&] { status = communicators[0]->Wait(*ticket, absl::InfiniteFuture()); });
  communicators[0]->Abort(absl::UnavailableError("worker-b was lost"));
  communicators[0]->Abort(absl::UnavailableError("later"));
  waiting.join();
  EXPECT_EQ(status, absl::AbortedError("worker-b was lost"));
}

TEST_P(Links, AbortReachesThePeersThatWaitForUs) {
  auto communicators = Join(GetParam(), 3);
  Meet(communicators);
  char mine = 0;
  std::vector<absl::Status> statuses(3);
  std::vector<std::thread> threads;
  for (const int rank : {0, 1}) {
    threads.emplace_back([&, rank] {
      char all[3];
      const auto ticket =
          communicators[rank]->EnqueueAllGather(nullptr, Lane::kMoments, &mine, 1, all);
      statuses[rank] = communicators[rank]->Wait(*ticket, absl::InfiniteFuture());
    });
  }
  communicators[2]->Abort(absl::UnavailableError("the coordinator said stop"));
  for (std::thread& thread : threads) thread.join();
  for (const int rank : {0, 1}) {
    EXPECT_EQ(statuses[rank].code(), absl::StatusCode::kAborted) << statuses[rank];
    EXPECT_THAT(std::string(statuses[rank].message()),
                AllOf(HasSubstr("member 2"), HasSubstr("the coordinator said stop")));
  }
}

TEST(Communicator, AbortIsNeverMissed) {
  // The abort comes at many moments of the waiter's way from its first look to its sleep.
  for (int round = 0; round < 200; ++round) {
    auto communicators = MakeLocalCommunicators(2, 64);
    char mine = 0, all[2];
    const auto ticket = communicators[0]->EnqueueAllGather(nullptr, Lane::kMoments, &mine, 1, all);
    std::atomic<bool> started{false};
    absl::Status status;
    std::thread waiting([&] {
      started = true;
      status = communicators[0]->Wait(*ticket, absl::Now() + absl::Seconds(5));
    });
    while (!started) {
    }
    const absl::Time moment = absl::Now() + absl::Nanoseconds(450) * round;
    while (absl::Now() < moment) {
    }
    communicators[round % 2]->Abort(absl::CancelledError("stop"));
    waiting.join();
    ASSERT_EQ(status.code(), absl::StatusCode::kAborted) << status;
  }
}

TEST(Communicator, MembersThatEnqueueDifferentOperationsAreTold) {
  OnMembers(Link::kThreads, 2, [](Communicator& c) {
    char mine[2] = {}, all[4];
    const auto ticket = c.EnqueueAllGather(nullptr, Lane::kMoments, mine, 1 + c.rank(), all);
    const absl::Status status = c.Wait(*ticket, Soon());
    EXPECT_TRUE(absl::IsInternal(status) || absl::IsAborted(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("enqueued another operation"));
  });
}

TEST(Communicator, ArgumentErrorsAreReportedAtOnce) {
  auto communicators = MakeLocalCommunicators(2, 1024);
  Communicator& c = *communicators[0];
  auto* inside = static_cast<float*>(*c.Allocate(512));
  float outside[16];
  std::vector<std::vector<const float*>> views;
  const auto exchange = [&](std::vector<const float*> mine, std::vector<int> parts, int64_t count) {
    return c.EnqueueExchange(nullptr, Lane::kGradients, mine, parts, count, &views).status();
  };
  EXPECT_THAT(std::string(exchange({outside}, {1, 1}, 16).message()),
              HasSubstr("not in memory of"));
  EXPECT_THAT(std::string(exchange({inside}, {1, 1}, 1000).message()),
              HasSubstr("not in memory of"));
  EXPECT_THAT(std::string(exchange({inside}, {2, 1}, 16).message()), HasSubstr("1 parts offered"));
  EXPECT_THAT(std::string(exchange({inside}, {1}, 16).message()), HasSubstr("2 members"));
  EXPECT_THAT(std::string(exchange({inside}, {1, 99}, 16).message()), HasSubstr("offers 99 parts"));
  EXPECT_FALSE(c.EnqueueGather(nullptr, Lane::kGradients, outside, 16).ok());
  EXPECT_FALSE(c.EnqueueBroadcast(nullptr, Lane::kGradients, 2, outside, 16).ok());
  EXPECT_FALSE(c.Wait({Lane::kGradients, 1}, Soon()).ok());
  EXPECT_EQ(c.Allocate(1024).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(c.Allocate(512).ok());
}

TEST(Communicator, MemoryIsSymmetricAndZeroed) {
  OnMembers(Link::kShared, 2, [](Communicator& c) {
    (void)c.Allocate(100);
    auto* mine = static_cast<int*>(*c.Allocate(sizeof(int)));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(mine) % 64, 0u);
    EXPECT_EQ(*mine, 0);
    char byte = 0, all[2];
    ASSERT_TRUE(c.Wait(*c.EnqueueAllGather(nullptr, Lane::kMoments, &byte, 1, all), Soon()).ok());
    *static_cast<int*>(c.Peer(1 - c.rank(), mine)) = 5 + c.rank();
    ASSERT_TRUE(c.Wait(*c.EnqueueAllGather(nullptr, Lane::kMoments, &byte, 1, all), Soon()).ok());
    EXPECT_EQ(*mine, 6 - c.rank());
  });
}

}  // namespace
}  // namespace lockstep::collective
