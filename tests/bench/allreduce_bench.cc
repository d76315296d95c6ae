// Latency and bus bandwidth of the canonical all-reduce between members of one slot and one leaf
// each: threads of this process, and processes over shared memory. One JSON object per line:
//   {"link":"processes","members":2,"bytes":4194304,"us":612.3,"busbw_gbps":6.85,"iterations":200}
// us: the median over iterations of the time from the last Done to the end of Finish, on member 0.
// busbw: 2 (W-1)/W * bytes / time, in 10^9 bytes per second (as nccl-tests define it).
// usage: allreduce_bench [largest bytes, default 64 MiB]
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "worker/collective/all_reduce.h"
#include "worker/collective/rendezvous.h"
#include "worker/collective/team.h"
#include "worker/device/cpu/cpu_device.h"

namespace lockstep::collective {
namespace {

constexpr int64_t kSmallest = 1 << 10;

Placement OneLeafEach(int members) {
  Placement placement{members, {}};
  for (int member = 0; member < members; ++member) placement.bounds.push_back({member, member + 1});
  return placement;
}

[[noreturn]] void Die(const absl::Status& status) {
  std::fprintf(stderr, "allreduce_bench: %s\n", status.ToString().c_str());
  std::_Exit(1);
}

size_t SharedBytes(int members, int64_t largest) {
  size_t bytes = 0;
  for (int64_t size = kSmallest; size <= largest; size *= 4) {
    bytes += CanonicalAllReduce::SharedBytes(OneLeafEach(members), size / 4);
  }
  return bytes;
}

void Measure(const char* link, Communicator& communicator, int64_t largest) {
  const int members = communicator.size();
  auto device = device::MakeCpuDevice();
  if (!device.ok()) Die(device.status());
  auto stream = (*device)->MakeStream();
  const Placement placement = OneLeafEach(members);
  for (int64_t bytes = kSmallest; bytes <= largest; bytes *= 4) {
    Team team(1);
    const int64_t size = bytes / 4;
    auto reduce =
        CanonicalAllReduce::Make(**device, &communicator, &team, placement, size, {{0, size}});
    if (!reduce.ok()) Die(reduce.status());
    const std::vector<uint8_t> present(members, 1);
    const int iterations =
        static_cast<int>(std::clamp<int64_t>((int64_t{256} << 20) / bytes, 10, 2000));
    std::vector<double> times;
    for (int i = -3; i < iterations; ++i) {
      const absl::Time deadline = absl::Now() + absl::Minutes(1);
      absl::Status status = (*reduce)->Begin(0, present, deadline);
      if (!status.ok()) Die(status);
      float* leaf = (*reduce)->Leaf(0, communicator.rank());
      std::fill(leaf, leaf + size, 1.0f + i);
      char byte = 0;
      std::vector<char> all(members);
      auto ready = communicator.EnqueueAllGather(nullptr, Lane::kMoments, &byte, 1, all.data());
      status = communicator.Wait(*ready, deadline);
      if (!status.ok()) Die(status);
      const auto start = std::chrono::steady_clock::now();
      (*reduce)->Done(0, **stream, communicator.rank(), 0, size);
      status = (*reduce)->Finish(0, **stream, deadline);
      if (!status.ok()) Die(status);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      if (i >= 0) times.push_back(took.count());
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    const double median = times[times.size() / 2];
    if (communicator.rank() != 0) continue;
    std::printf(
        "{\"link\":\"%s\",\"members\":%d,\"bytes\":%lld,\"us\":%.1f,\"busbw_gbps\":%.2f,"
        "\"iterations\":%d}\n",
        link, members, static_cast<long long>(bytes), median * 1e6,
        2.0 * (members - 1) / members * bytes / median / 1e9, iterations);
    std::fflush(stdout);
  }
}

void MeasureThreads(int members, int64_t largest) {
  auto communicators = MakeLocalCommunicators(members, SharedBytes(members, largest));
  std::vector<std::thread> threads;
  for (auto& communicator : communicators) {
    threads.emplace_back([&] { Measure("threads", *communicator, largest); });
  }
  for (std::thread& thread : threads) thread.join();
}

// One pipe per member carries its rendezvous bytes to all: each writes a copy for every reader.
void MeasureProcesses(int members, bool gloo, int64_t largest) {
  std::vector<std::vector<int>> to(members), from(members);
  for (int writer = 0; writer < members; ++writer) {
    for (int reader = 0; reader < members; ++reader) {
      int ends[2];
      if (pipe2(ends, O_CLOEXEC) != 0) Die(absl::InternalError("pipe"));
      from[writer].push_back(ends[0]);
      to[writer].push_back(ends[1]);
    }
  }
  std::vector<pid_t> children;
  for (int rank = 0; rank < members; ++rank) {
    const pid_t child = fork();
    if (child != 0) {
      children.push_back(child);
      continue;
    }
    RendezvousOptions options;
    options.rank = rank;
    for (int member = 0; member < members; ++member) {
      options.members.push_back(
          {"process " + std::to_string(member), gloo ? "host" + std::to_string(member) : "here"});
    }
    options.address = "127.0.0." + std::to_string(rank + 1);
    options.shared_bytes = SharedBytes(members, largest);
    auto end = OpenRendezvous(options);
    if (!end.ok()) Die(end.status());
    const std::string own = (*end)->bytes();
    std::vector<std::string> all(members, std::string(own.size(), '\0'));
    for (const int fd : to[rank]) {
      if (write(fd, own.data(), own.size()) < 0) Die(absl::InternalError("write"));
    }
    for (int member = 0; member < members; ++member) {
      if (read(from[member][rank], all[member].data(), own.size()) < 0) {
        Die(absl::InternalError("read"));
      }
    }
    auto communicator = (*end)->Connect(all, absl::Now() + absl::Minutes(1));
    if (!communicator.ok()) Die(communicator.status());
    Measure(gloo ? "gloo" : "processes", **communicator, largest);
    communicator->reset();  // members part together
    std::_Exit(0);
  }
  for (const pid_t child : children) waitpid(child, nullptr, 0);
  for (int member = 0; member < members; ++member) {
    for (const int fd : from[member]) close(fd);
    for (const int fd : to[member]) close(fd);
  }
}

}  // namespace
}  // namespace lockstep::collective

int main(int argc, char** argv) {
  const int64_t largest = argc > 1 ? std::atoll(argv[1]) : int64_t{64} << 20;
  for (const bool gloo : {false, true}) {
    for (const int members : {2, 4}) {
      lockstep::collective::MeasureProcesses(members, gloo, largest);
    }
  }
  for (const int members : {2, 4}) lockstep::collective::MeasureThreads(members, largest);
  return 0;
}
