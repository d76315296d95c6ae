// Latency and bus bandwidth of the canonical all-reduce between members of one slot and one leaf
// each: threads of this process, processes over shared memory, and processes over Gloo's TCP on the
// loopback interface. One JSON object per line:
//   {"link":"processes","members":2,"bytes":4194304,"us":612.3,"busbw_gbps":6.85,"iterations":200}
// us: the median over iterations of the time from the call of the member that comes last (it has
// written its leaf, as all have) until the last member has the sum.
// busbw: 2 (W-1)/W * bytes / time, in 10^9 bytes per second (as nccl-tests define it).
// usage: allreduce_bench [all | processes | threads | gloo [members, default 2 and 4]]
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

constexpr int64_t kSizes[] = {1 << 10, 64 << 10, 1 << 20, 4 << 20, 64 << 20};

Placement OneLeafEach(int members) {
  Placement placement{members, {}};
  for (int member = 0; member < members; ++member) placement.bounds.push_back({member, member + 1});
  return placement;
}

[[noreturn]] void Die(const absl::Status& status) {
  std::fprintf(stderr, "allreduce_bench: %s\n", status.ToString().c_str());
  std::_Exit(1);
}

size_t SharedBytes(int members) {
  size_t bytes = 0;
  for (const int64_t size : kSizes) {
    bytes += CanonicalAllReduce::SharedBytes(OneLeafEach(members), size / 4);
  }
  return bytes;
}

// Nanoseconds of the clock that all processes of the machine share.
struct Span {
  int64_t begin = 0, end = 0;
};
int64_t Now() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

void Measure(const char* link, Communicator& communicator) {
  const int members = communicator.size();
  auto device = device::MakeCpuDevice();
  if (!device.ok()) Die(device.status());
  auto stream = (*device)->MakeStream();
  const Placement placement = OneLeafEach(members);
  for (const int64_t bytes : kSizes) {
    Team team(1);
    const int64_t size = bytes / 4;
    auto reduce =
        CanonicalAllReduce::Make(**device, &communicator, &team, placement, size, {{0, size}});
    if (!reduce.ok()) Die(reduce.status());
    const std::vector<uint8_t> present(members, 1);
    const int iterations =
        static_cast<int>(std::clamp<int64_t>((int64_t{256} << 20) / bytes, 10, 2000));
    std::vector<double> times;
    std::vector<Span> spans(members);
    for (int i = -3; i < iterations; ++i) {
      const absl::Time deadline = absl::Now() + absl::Minutes(1);
      absl::Status status = (*reduce)->Begin(0, present, deadline);
      if (!status.ok()) Die(status);
      float* leaf = (*reduce)->Leaf(0, communicator.rank());
      std::fill(leaf, leaf + size, 1.0f + i);
      const auto gather = [&](Span mine) {
        auto ticket = communicator.EnqueueAllGather(nullptr, Lane::kMoments, &mine, sizeof(mine),
                                                    spans.data());
        if (!ticket.ok()) Die(ticket.status());
        const absl::Status gathered = communicator.Wait(*ticket, deadline);
        if (!gathered.ok()) Die(gathered);
      };
      gather({});  // nobody begins before all are ready
      Span mine;
      mine.begin = Now();
      (*reduce)->Done(0, **stream, communicator.rank(), 0, size);
      status = (*reduce)->Finish(0, **stream, deadline);
      if (!status.ok()) Die(status);
      mine.end = Now();
      gather(mine);
      Span all = spans[0];
      for (const Span& span : spans) {
        all = {std::max(all.begin, span.begin), std::max(all.end, span.end)};
      }
      if (i >= 0) times.push_back(static_cast<double>(all.end - all.begin) * 1e-9);
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

void MeasureThreads(int members) {
  auto communicators = MakeLocalCommunicators(members, SharedBytes(members));
  std::vector<std::thread> threads;
  for (auto& communicator : communicators) {
    threads.emplace_back([&] { Measure("threads", *communicator); });
  }
  for (std::thread& thread : threads) thread.join();
}

// One pipe per member carries its rendezvous bytes to all: each writes a copy for every reader.
void MeasureProcesses(int members, bool gloo) {
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
    options.shared_bytes = SharedBytes(members);
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
    Measure(gloo ? "gloo" : "processes", **communicator);
    communicator->reset();  // members part together
    std::_Exit(0);
  }
  bool failed = false;
  for (const pid_t child : children) {
    int how = 0;
    failed |= waitpid(child, &how, 0) != child || how != 0;
  }
  if (failed) std::exit(1);
  for (int member = 0; member < members; ++member) {
    for (const int fd : from[member]) close(fd);
    for (const int fd : to[member]) close(fd);
  }
}

}  // namespace
}  // namespace lockstep::collective

int main(int argc, char** argv) {
  const std::string link = argc > 1 ? argv[1] : "all";
  const int only = argc > 2 ? std::atoi(argv[2]) : 0;
  const bool known = link == "all" || link == "processes" || link == "threads" || link == "gloo";
  if (!known || (argc > 2 && only < 2)) {
    std::fprintf(stderr, "usage: allreduce_bench [all | processes | threads | gloo [members]]\n");
    return 2;
  }
  const std::vector<int> counts = only > 0 ? std::vector<int>{only} : std::vector<int>{2, 4};
  const auto wanted = [&](const char* name) { return link == "all" || link == name; };
  for (const int members : counts) {
    if (wanted("processes")) lockstep::collective::MeasureProcesses(members, /*gloo=*/false);
    if (wanted("gloo")) lockstep::collective::MeasureProcesses(members, /*gloo=*/true);
    if (wanted("threads")) lockstep::collective::MeasureThreads(members);
  }
  return 0;
}
