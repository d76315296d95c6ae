// NCCL of the emulator: members are processes of one machine, each with one communicator of the
// job, joined by sockets of their own. It keeps NCCL's manners: it is nonblocking, operations run
// in the order of their stream, what waits for a member that is gone waits until the communicator
// is aborted, and a member that is gone becomes an asynchronous error. Calls that NCCL would
// misunderstand silently (sizes that differ between members) end the process with a report.
//
// $LOCKSTEP_EMULATED_NCCL_VERSION ("2.28.9") is the version that it says it is. To the file that
// $LOCKSTEP_EMULATED_NCCL_LOG names, with ".RANK" behind it, it appends a line for each group of
// operations that is enqueued: the number of its communicator.
#include <nccl.h>
#include <poll.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/gpu/emulator/emulator.h"
#include "tests/gpu/emulator/report.h"
#include "worker/collective/nccl_api.h"

// What an operation needs stays while streams and graphs hold it.
struct Link {
  int rank = 0, ranks = 0, number = 0;  // of the process's communicators, from 0
  std::vector<int> peers;               // sockets by rank; ours is -1
  std::atomic<ncclResult_t> state{ncclInProgress};
  std::atomic<bool> aborted{false};

  ~Link() {
    for (const int peer : peers) {
      if (peer >= 0) close(peer);
    }
  }
};

struct ncclComm {
  std::shared_ptr<Link> link;
  std::thread connecting;
  std::set<void*> registered;
};

namespace lockstep::emulator {
namespace {

constexpr auto kMostConnecting = std::chrono::seconds(60);

struct Transfer {
  bool send = false;
  int peer = 0;
  char* data = nullptr;
  size_t bytes = 0;
};
struct Operation {
  cudaStream_t stream = nullptr;    // one for each communicator
  std::vector<Transfer> transfers;  // in the order of the calls
  std::vector<std::function<void()>> behind;
};
struct Group {
  int depth = 0;
  std::map<ncclComm*, Operation> operations;
};
Group& ThreadGroup() {
  thread_local Group group;
  return group;
}

void Log(const Link& link) {
  const char* const path = std::getenv("LOCKSTEP_EMULATED_NCCL_LOG");
  if (path == nullptr) return;
  std::FILE* const file =
      std::fopen((std::string(path) + "." + std::to_string(link.rank)).c_str(), "a");
  if (file == nullptr) Fatal("NCCL: its log cannot be written");
  std::fprintf(file, "%d\n", link.number);
  std::fclose(file);
}

size_t SizeOf(ncclDataType_t type) { return type == ncclFloat ? sizeof(float) : 1; }

sockaddr_un AddressOf(const std::string& name, socklen_t* length) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  // The first byte is zero: a name of the kernel's, which nothing is left of.
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

bool All(int socket, void* data, size_t bytes, bool send) {
  auto* at = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t done =
        send ? ::send(socket, at, bytes, MSG_NOSIGNAL) : recv(socket, at, bytes, 0);
    if (done <= 0) {
      if (done < 0 && errno == EINTR) continue;
      return false;
    }
    at += done;
    bytes -= static_cast<size_t>(done);
  }
  return true;
}

// Joins all: members connect to those before them and accept those behind.
bool Join(Link& link, const std::string& id) {
  const auto deadline = std::chrono::steady_clock::now() + kMostConnecting;
  const auto name_of = [&](int rank) { return "nccl-" + id + "-" + std::to_string(rank); };
  const auto waiting = [&] { return !link.aborted && std::chrono::steady_clock::now() < deadline; };
  socklen_t length;
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address = AddressOf(name_of(link.rank), &length);
  bool good = listener >= 0 && bind(listener, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
              listen(listener, link.ranks) == 0;
  for (int peer = 0; good && peer < link.rank; ++peer) {
    address = AddressOf(name_of(peer), &length);
    const int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool connected = false;
    while (!connected && waiting()) {
      connected = connect(connection, reinterpret_cast<sockaddr*>(&address), length) == 0;
      if (!connected) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    int32_t mine = link.rank;
    good = connected && All(connection, &mine, sizeof(mine), true);
    link.peers[peer] = connection;
  }
  for (int left = link.ranks - 1 - link.rank; good && left > 0; --left) {
    pollfd wait = {listener, POLLIN, 0};
    while (waiting() && poll(&wait, 1, 10) == 0) {
    }
    const int connection = waiting() ? accept4(listener, nullptr, nullptr, SOCK_CLOEXEC) : -1;
    int32_t theirs = -1;
    good = connection >= 0 && All(connection, &theirs, sizeof(theirs), false) &&
           theirs > link.rank && theirs < link.ranks && link.peers[theirs] < 0;
    if (good) {
      link.peers[theirs] = connection;
    } else if (connection >= 0) {
      close(connection);
    }
  }
  if (listener >= 0) close(listener);
  return good;
}

// Runs the transfers of one operation, those with a peer in their order. Each is preceded by its
// size. Returns when all is done, or when the communicator was aborted.
void Run(Link& link, const std::vector<Transfer>& transfers) {
  struct Flow {
    std::deque<const Transfer*> queue;
    size_t done = 0;  // of the first: bytes of its size, then of its data
    uint64_t size = 0;
  };
  std::vector<Flow> out(link.ranks), in(link.ranks);
  std::deque<const Transfer*> to_self, from_self;
  for (const Transfer& transfer : transfers) {
    if (transfer.peer == link.rank) {
      (transfer.send ? to_self : from_self).push_back(&transfer);
    } else {
      (transfer.send ? out : in)[transfer.peer].queue.push_back(&transfer);
    }
  }
  for (; !to_self.empty() && !from_self.empty(); to_self.pop_front(), from_self.pop_front()) {
    std::memmove(from_self.front()->data, to_self.front()->data, to_self.front()->bytes);
  }
  const auto advance = [&](Flow& flow, int peer, bool send) {
    const Transfer& transfer = *flow.queue.front();
    constexpr size_t kHead = sizeof(uint64_t);
    if (send) flow.size = transfer.bytes;
    char* at = flow.done < kHead ? reinterpret_cast<char*>(&flow.size) + flow.done
                                 : transfer.data + (flow.done - kHead);
    const size_t left = (flow.done < kHead ? kHead : kHead + transfer.bytes) - flow.done;
    if (left > 0) {
      const ssize_t moved = send ? ::send(link.peers[peer], at, left, MSG_NOSIGNAL | MSG_DONTWAIT)
                                 : recv(link.peers[peer], at, left, MSG_DONTWAIT);
      if (moved == 0 || (moved < 0 && errno != EAGAIN && errno != EINTR)) return false;
      if (moved < 0) return true;
      flow.done += static_cast<size_t>(moved);
      if (!send && flow.done == kHead && flow.size != transfer.bytes) {
        Fatal("NCCL: a receive of " + std::to_string(transfer.bytes) + " bytes from rank " +
              std::to_string(peer) + ", which sends " + std::to_string(flow.size));
      }
    }
    if (flow.done == kHead + transfer.bytes) {
      flow.queue.pop_front();
      flow.done = 0;
    }
    return true;
  };
  while (!link.aborted) {
    std::vector<pollfd> polled;
    std::vector<int> ranks;
    for (int peer = 0; peer < link.ranks; ++peer) {
      const int events =
          (out[peer].queue.empty() ? 0 : POLLOUT) | (in[peer].queue.empty() ? 0 : POLLIN);
      if (events == 0) continue;
      polled.push_back({link.peers[peer], static_cast<short>(events), 0});
      ranks.push_back(peer);
    }
    if (polled.empty()) return;
    // Until somebody aborts it.
    if (link.state != ncclSuccess || CurrentNcclFault() == NcclFault::kHangsExchanging) {
      Pause();
      continue;
    }
    if (poll(polled.data(), polled.size(), 0) <= 0) {
      Pause();
      continue;
    }
    for (size_t i = 0; i < polled.size(); ++i) {
      const int peer = ranks[i];
      bool good = true;
      if ((polled[i].revents & POLLOUT) != 0) good = advance(out[peer], peer, true);
      if (good && !in[peer].queue.empty() && (polled[i].revents & (POLLIN | POLLHUP)) != 0) {
        good = advance(in[peer], peer, false);
      } else if (good && (polled[i].revents & (POLLERR | POLLHUP)) != 0) {
        good = false;
      }
      if (!good) link.state = ncclRemoteError;
    }
  }
}

ncclResult_t Add(ncclComm_t comm, cudaStream_t stream, std::vector<Transfer> transfers,
                 std::function<void()> behind = nullptr) {
  if (comm->link->state != ncclSuccess) return comm->link->state;
  Group& group = ThreadGroup();
  const bool alone = group.depth == 0;
  if (alone) ncclGroupStart();
  Operation& all = group.operations[comm];
  if (!all.transfers.empty() && all.stream != stream) {
    Fatal("NCCL: a group of one communicator on two streams");
  }
  all.stream = stream;
  all.transfers.insert(all.transfers.end(), transfers.begin(), transfers.end());
  if (behind) all.behind.push_back(std::move(behind));
  return alone ? ncclGroupEnd() : ncclSuccess;
}

}  // namespace
}  // namespace lockstep::emulator

using lockstep::emulator::Add;
using lockstep::emulator::CurrentNcclFault;
using lockstep::emulator::NcclFault;
using lockstep::emulator::SizeOf;
using lockstep::emulator::ThreadGroup;
using lockstep::emulator::Transfer;

ncclResult_t ncclGetVersion(int* version) {
  int major = 2, minor = 28, patch = 9;
  if (const char* text = std::getenv("LOCKSTEP_EMULATED_NCCL_VERSION"); text != nullptr) {
    if (std::sscanf(text, "%d.%d.%d", &major, &minor, &patch) != 3) return ncclInvalidArgument;
  }
  *version = major * 10000 + minor * 100 + patch;
  return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  uint64_t random[2];
  if (getrandom(random, sizeof(random), 0) != sizeof(random)) return ncclSystemError;
  std::snprintf(id->internal, sizeof(id->internal), "%016llx%016llx",
                static_cast<unsigned long long>(random[0]),
                static_cast<unsigned long long>(random[1]));
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  if (rank < 0 || rank >= ranks || config->blocking != 0) return ncclInvalidArgument;
  if (CurrentNcclFault() == NcclFault::kDiesConnecting) raise(SIGKILL);
  id.internal[NCCL_UNIQUE_ID_BYTES - 1] = '\0';
  auto* made = new ncclComm;
  made->link = std::make_shared<Link>();
  made->link->rank = rank;
  made->link->ranks = ranks;
  static std::atomic<int> made_before{0};
  made->link->number = made_before++;
  made->link->peers.assign(ranks, -1);
  *comm = made;
  if (CurrentNcclFault() == NcclFault::kHangsConnecting) return ncclInProgress;
  made->connecting = std::thread([link = made->link, name = std::string(id.internal)] {
    link->state = lockstep::emulator::Join(*link, name) ? ncclSuccess : ncclRemoteError;
  });
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  *error = comm->link->state;
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  const ncclResult_t state = comm->link->state;
  return state == ncclInProgress ? ncclInvalidUsage : state;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (comm->connecting.joinable()) comm->connecting.join();
  if (!comm->registered.empty()) {
    lockstep::emulator::Fatal("NCCL: a communicator is destroyed with memory registered");
  }
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  while (CurrentNcclFault() == NcclFault::kHangsAborting) pause();
  comm->link->aborted = true;
  if (comm->connecting.joinable()) comm->connecting.join();
  delete comm;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclSystemError:
      return "unhandled system error";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    case ncclInProgress:
      return "NCCL operation in progress";
    default:
      return "internal error";
  }
}

const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGroupStart() {
  ++ThreadGroup().depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  auto& group = ThreadGroup();
  if (group.depth == 0) return ncclInvalidUsage;
  if (--group.depth > 0) return ncclSuccess;
  cudaError_t error = cudaSuccess;
  for (auto& [comm, operation] : group.operations) {
    lockstep::emulator::Log(*comm->link);
    const cudaError_t one = lockstep::emulator::Enqueue(
        operation.stream, [link = comm->link, all = std::move(operation)] {
          lockstep::emulator::Run(*link, all.transfers);
          if (link->aborted) return;
          for (const auto& work : all.behind) work();
        });
    if (error == cudaSuccess) error = one;
  }
  group.operations.clear();
  return error == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  auto* data = static_cast<char*>(const_cast<void*>(from));
  return Add(comm, stream, {{true, peer, data, count * SizeOf(type)}});
}

ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return Add(comm, stream, {{false, peer, static_cast<char*>(to), count * SizeOf(type)}});
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * SizeOf(type);
  auto* mine = static_cast<char*>(const_cast<void*>(from));
  std::vector<Transfer> transfers;
  for (int peer = 0; peer < comm->link->ranks; ++peer) {
    transfers.push_back({true, peer, mine, bytes});
    transfers.push_back({false, peer, static_cast<char*>(to) + peer * bytes, bytes});
  }
  return Add(comm, stream, std::move(transfers));
}

// Not in the order of ranks: nobody may count on that.
ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) {
  if (type != ncclFloat || operation != ncclSum) return ncclInvalidArgument;
  const int ranks = comm->link->ranks;
  auto* mine = static_cast<char*>(const_cast<void*>(from));
  const auto all = std::make_shared<std::vector<float>>(count * ranks);
  std::vector<Transfer> transfers;
  for (int peer = 0; peer < ranks; ++peer) {
    transfers.push_back({true, peer, mine, count * sizeof(float)});
    transfers.push_back(
        {false, peer, reinterpret_cast<char*>(all->data() + peer * count), count * sizeof(float)});
  }
  return Add(comm, stream, std::move(transfers), [all, to, count, ranks] {
    for (size_t i = 0; i < count; ++i) {
      float sum = (*all)[(ranks - 1) * count + i];
      for (int peer = ranks - 2; peer >= 0; --peer) sum += (*all)[peer * count + i];
      static_cast<float*>(to)[i] = sum;
    }
  });
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * SizeOf(type);
  const Link& link = *comm->link;
  std::vector<Transfer> transfers;
  if (link.rank != root) {
    transfers.push_back({false, root, static_cast<char*>(to), bytes});
  } else {
    for (int peer = 0; peer < link.ranks; ++peer) {
      transfers.push_back({true, peer, static_cast<char*>(const_cast<void*>(from)), bytes});
    }
    transfers.push_back({false, root, static_cast<char*>(to), bytes});
  }
  return Add(comm, stream, std::move(transfers));
}

ncclResult_t ncclMemAlloc(void** memory, size_t bytes) {
  return cudaMalloc(memory, bytes) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t ncclMemFree(void* memory) {
  return cudaFree(memory) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t ncclCommRegister(const ncclComm_t comm, void* memory, size_t, void** handle) {
  comm->registered.insert(memory);
  *handle = memory;
  return ncclSuccess;
}

ncclResult_t ncclCommDeregister(const ncclComm_t comm, void* handle) {
  return comm->registered.erase(handle) == 1 ? ncclSuccess : ncclInvalidArgument;
}

namespace lockstep::collective {

absl::StatusOr<const NcclApi*> FindNccl() {
  static const NcclApi api = {
      ncclGetVersion,   ncclGetUniqueId, ncclCommInitRankConfig, ncclCommGetAsyncError,
      ncclCommFinalize, ncclCommDestroy, ncclCommAbort,          ncclGetErrorString,
      ncclGetLastError, ncclGroupStart,  ncclGroupEnd,           ncclSend,
      ncclRecv,         ncclAllGather,   ncclAllReduce,          ncclBroadcast,
      ncclMemAlloc,     ncclMemFree,     ncclCommRegister,       ncclCommDeregister};
  return &api;
}

}  // namespace lockstep::collective
