#include "worker/collective/gloo_peers.h"

#include <arpa/inet.h>
#include <errno.h>
#include <gloo/transport/address.h>
#include <gloo/transport/context.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>
#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

namespace lockstep::collective {
namespace {

using gloo::transport::UnboundBuffer;

// Longer than anything: what ends a wait is an interruption by our own deadline thread.
constexpr std::chrono::milliseconds kForever = std::chrono::hours(1000);
constexpr auto kGoodbyePatience = std::chrono::milliseconds(100);
constexpr absl::Duration kPartingPatience = absl::Seconds(1);
// How often a wait looks whether its connection still stands.
constexpr absl::Duration kPoll = absl::Milliseconds(50);  // of what may have been aborted
constexpr absl::Duration kProbePeriod = absl::Milliseconds(100);

// Above every slot that an operation may use.
constexpr uint64_t kHelloSlot = ~uint64_t{0};
constexpr uint64_t kGoodbyeSlot = kHelloSlot - 1;
constexpr uint64_t kPartingSlot = kHelloSlot - 2;
constexpr uint64_t kProbeSlot = kHelloSlot - 3;  // nothing is ever sent on it

struct Hello {
  uint64_t sender_nonce = 0, receiver_nonce = 0;
};

struct Goodbye {
  int32_t origin = 0;
  char reason[508] = {};
};

// Runs a call into Gloo; its message (without the source line that opens it) where it throws.
template <typename Call>
absl::Status Guard(Call&& call) {
  std::string message;
  try {
    call();
    return absl::OkStatus();
  } catch (const std::exception& e) {
    message = e.what();
  } catch (...) {
    message = "unknown exception";
  }
  const size_t bracket = message.find("] ");
  if (!message.empty() && message[0] == '[' && bracket != std::string::npos) {
    message = message.substr(bracket + 2);
  }
  return absl::UnavailableError(message);
}

// Gloo would crash on what is no address, and loses memory where it cannot bind.
absl::Status CheckAddress(const std::string& address) {
  sockaddr_in v4{};
  sockaddr_in6 v6{};
  v4.sin_family = AF_INET;
  v6.sin6_family = AF_INET6;
  const bool is_v4 = inet_pton(AF_INET, address.c_str(), &v4.sin_addr) == 1;
  if (!is_v4 && inet_pton(AF_INET6, address.c_str(), &v6.sin6_addr) != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", address, "\" is not an IP address by which other hosts reach this one"));
  }
  const int fd = socket(is_v4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int bound = fd < 0  ? -1
                    : is_v4 ? bind(fd, reinterpret_cast<const sockaddr*>(&v4), sizeof(v4))
                            : bind(fd, reinterpret_cast<const sockaddr*>(&v6), sizeof(v6));
  const int error = errno;
  if (fd >= 0) close(fd);
  if (bound == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot listen on ", address, ": ", strerror(error)));
}

void IgnoreBrokenPipes() {
  struct sigaction current {};
  if (sigaction(SIGPIPE, nullptr, &current) == 0 && current.sa_handler == SIG_DFL) {
    signal(SIGPIPE, SIG_IGN);
  }
}

}  // namespace

struct GlooPeers::Transfers::Item {
  int member = 0;
  bool send = false;
  bool done = false;
  std::unique_ptr<UnboundBuffer> buffer;
};

GlooPeers::Transfers::Transfers() = default;
GlooPeers::Transfers::~Transfers() = default;

struct GlooPeers::State {
  struct Waiting {
    UnboundBuffer* buffer = nullptr;
    int member = 0;
    bool send = false;
    absl::Time deadline, next_probe;
    absl::Status end;  // why it was interrupted: DeadlineExceeded, or Unavailable with the break

    void Interrupt() {
      if (send) {
        buffer->abortWaitSend();
      } else {
        buffer->abortWaitRecv();
      }
    }
  };
  struct Farewell {  // what a peer says when it gives up
    Goodbye message;
    std::unique_ptr<UnboundBuffer> buffer;
  };
  // A receive that never completes, to be asked whether the connection stands: where it breaks in
  // the middle of a message, Gloo tells every receive that waits for its turn, but not the one in
  // progress.
  struct Probe {
    char byte = 0;
    std::unique_ptr<UnboundBuffer> buffer;

    // Unavailable where the connection is broken. Does not wait.
    absl::Status Ask() {
      return Guard([this] {
        buffer->abortWaitRecv();
        buffer->waitRecv(nullptr, kForever);
      });
    }
  };

  int rank = 0;
  std::vector<std::string> names;
  std::vector<int> remote;
  std::shared_ptr<gloo::transport::Device> device;
  std::shared_ptr<gloo::transport::Context> context;
  std::vector<std::unique_ptr<Farewell>> farewells;  // by member
  std::vector<std::unique_ptr<Probe>> probes;        // by member
  Goodbye goodbye;
  std::unique_ptr<UnboundBuffer> goodbye_buffer;

  absl::Mutex mutex;
  absl::CondVar changed;
  bool connected = false;  // written by Connect only
  bool aborted ABSL_GUARDED_BY(mutex) = false;
  bool said_goodbye ABSL_GUARDED_BY(mutex) = false;
  bool stopping ABSL_GUARDED_BY(mutex) = false;
  Waiting waiting[kLanes] ABSL_GUARDED_BY(mutex);
  absl::Time wakes ABSL_GUARDED_BY(mutex) =
      absl::InfiniteFuture();  // the deadline thread, by itself
  std::thread deadlines;

  std::string Name(int member) const {
    return absl::StrCat("member ", member, " (", names[member], ")");
  }

  // Interrupts the waits whose deadline has passed or whose connection is broken.
  void KeepDeadlines() {
    absl::MutexLock lock(&mutex);
    while (!stopping) {
      absl::Time next = absl::InfiniteFuture();
      for (Waiting& wait : waiting) {
        if (wait.buffer == nullptr || !wait.end.ok()) continue;
        const absl::Time now = absl::Now();
        if (now >= wait.next_probe) {
          wait.end = probes[wait.member]->Ask();
          wait.next_probe = now + kProbePeriod;
        }
        if (wait.end.ok() && wait.deadline <= now) wait.end = absl::DeadlineExceededError("late");
        if (!wait.end.ok()) {
          wait.Interrupt();
        } else {
          next = std::min({next, wait.deadline, wait.next_probe});
        }
      }
      wakes = next;
      changed.WaitWithDeadline(&mutex, next);
    }
  }

  void StopThread() {
    {
      absl::MutexLock lock(&mutex);
      stopping = true;
      changed.SignalAll();
    }
    if (deadlines.joinable()) deadlines.join();
  }
};

GlooPeers::GlooPeers(std::unique_ptr<State> state) : state_(std::move(state)) {}

absl::StatusOr<std::unique_ptr<GlooPeers>> GlooPeers::Open(const std::string& address, int rank,
                                                           const std::vector<MemberInfo>& members,
                                                           const std::vector<int>& remote) {
  if (const absl::Status status = CheckAddress(address); !status.ok()) return status;
  IgnoreBrokenPipes();
  auto state = std::make_unique<State>();
  state->rank = rank;
  for (const MemberInfo& member : members) state->names.push_back(member.name);
  state->remote = remote;
  state->farewells.resize(members.size());
  state->probes.resize(members.size());
  const absl::Status status = Guard([&] {
    state->device = gloo::transport::tcp::CreateDevice(gloo::transport::tcp::attr(address.c_str()));
    state->context = state->device->createContext(rank, static_cast<int>(members.size()));
    state->context->setTimeout(std::chrono::hours(1));
    for (const int member : remote) state->context->createPair(member);
  });
  if (!status.ok()) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", address, ": ", status.message()));
  }
  return std::unique_ptr<GlooPeers>(new GlooPeers(std::move(state)));
}

GlooPeers::~GlooPeers() {
  PartFromPeers();
  state_->StopThread();
  // Buffers before the pairs that may refer to them; destruction may throw nothing, but closes
  // sockets.
  state_->farewells.clear();
  state_->probes.clear();
  state_->goodbye_buffer.reset();
  state_->context.reset();
  state_->device.reset();
}

const std::vector<int>& GlooPeers::peers() const { return state_->remote; }

std::string GlooPeers::AddressFor(int member) const {
  std::string bytes;
  Guard([&] {
    const std::vector<char> address = state_->context->getPair(member)->address().bytes();
    bytes.assign(address.begin(), address.end());
  }).IgnoreError();
  return bytes;
}

absl::Status GlooPeers::Connect(const std::vector<std::string>& addresses,
                                const std::vector<uint64_t>& nonces, absl::Time deadline,
                                Aborted aborted) {
  State& s = *state_;
  // Gloo's connect blocks without a deadline of its own: one thread per peer, and closing the pairs
  // is what ends those that are late.
  struct Attempts {
    absl::Mutex mutex;
    int left ABSL_GUARDED_BY(mutex) = 0;
    bool failed ABSL_GUARDED_BY(mutex) = false;
    bool closing ABSL_GUARDED_BY(mutex) = false;
    std::vector<std::string> missing ABSL_GUARDED_BY(mutex);
  } attempts;
  {
    absl::MutexLock lock(&attempts.mutex);
    attempts.left = static_cast<int>(s.remote.size());
  }
  std::vector<std::thread> threads;
  for (const int member : s.remote) {
    threads.emplace_back([&, member] {
      const std::string& address = addresses[member];
      const absl::Status status = Guard([&] {
        s.context->getPair(member)->connect(std::vector<char>(address.begin(), address.end()));
      });
      absl::MutexLock lock(&attempts.mutex);
      --attempts.left;
      // A pair that is closed returns from connect as if it had succeeded.
      if (!status.ok() && !attempts.closing) {
        attempts.failed = true;
        attempts.missing.push_back(absl::StrCat(s.Name(member), ": ", status.message()));
      } else if (attempts.closing && !attempts.failed) {
        attempts.missing.push_back(absl::StrCat(s.Name(member), ": no answer"));
      }
    });
  }
  const auto settled = [&attempts]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(attempts.mutex) {
    return attempts.left == 0 || attempts.failed;
  };
  absl::Status cause;
  for (bool done = false; !done && (cause = aborted()).ok();) {
    absl::MutexLock lock(&attempts.mutex);
    const absl::Time until = std::min(deadline, absl::Now() + kPoll);
    done = attempts.mutex.AwaitWithDeadline(absl::Condition(&settled), until) ||
           absl::Now() >= deadline;
  }
  const auto close_all = [&s] {
    for (const int member : s.remote) {
      Guard([&] { s.context->getPair(member)->close(); }).IgnoreError();
    }
  };
  {
    bool closing;
    {
      absl::MutexLock lock(&attempts.mutex);
      closing = attempts.closing = attempts.left > 0;
    }
    if (closing) close_all();
  }
  for (std::thread& thread : threads) thread.join();
  if (!cause.ok()) return cause;
  {
    absl::MutexLock lock(&attempts.mutex);
    if (!attempts.missing.empty()) {
      std::string message = "cannot connect to ";
      for (size_t i = 0; i < attempts.missing.size(); ++i) {
        absl::StrAppend(&message, i == 0 ? "" : "; ", attempts.missing[i]);
      }
      return absl::UnavailableError(message);
    }
  }
  absl::Status ready = Guard([&s] {
    for (const int member : s.remote) {
      auto probe = std::make_unique<State::Probe>();
      probe->buffer = s.context->createUnboundBuffer(&probe->byte, 1);
      probe->buffer->recv(member, kProbeSlot);
      s.probes[member] = std::move(probe);
    }
  });
  if (!ready.ok()) return absl::UnavailableError(absl::StrCat("lost a peer: ", ready.message()));
  s.deadlines = std::thread([&s] { s.KeepDeadlines(); });

  // That the other end is the announced member, and the generation ours.
  std::vector<Hello> ours(addresses.size()), theirs(addresses.size());
  Transfers hello;
  for (const int member : s.remote) {
    ours[member] = {nonces[s.rank], nonces[member]};
    Receive(hello, member, &theirs[member], sizeof(Hello), kHelloSlot);
    Send(hello, member, &ours[member], sizeof(Hello), kHelloSlot);
  }
  int origin = 0;
  const absl::Status status = Await(Lane::kGradients, hello, deadline, &origin);
  if (!status.ok()) {
    close_all();
    return absl::UnavailableError(absl::StrCat("greeting failed: ", status.message()));
  }
  for (const int member : s.remote) {
    if (theirs[member].sender_nonce == nonces[member] &&
        theirs[member].receiver_nonce == nonces[s.rank]) {
      continue;
    }
    close_all();
    return absl::FailedPreconditionError(absl::StrCat(
        s.Name(member), " answered for another rendezvous: its announcement is stale"));
  }
  ready = Guard([&s] {
    s.goodbye_buffer = s.context->createUnboundBuffer(&s.goodbye, sizeof(Goodbye));
    for (const int member : s.remote) {
      auto farewell = std::make_unique<State::Farewell>();
      farewell->buffer = s.context->createUnboundBuffer(&farewell->message, sizeof(Goodbye));
      farewell->buffer->recv(member, kGoodbyeSlot);
      s.farewells[member] = std::move(farewell);
    }
  });
  if (!ready.ok()) return absl::UnavailableError(absl::StrCat("lost a peer: ", ready.message()));
  s.connected = true;
  return absl::OkStatus();
}

void GlooPeers::Send(Transfers& transfers, int member, const void* data, size_t bytes,
                     uint64_t slot) {
  if (bytes == 0 || !transfers.status_.ok()) return;
  const absl::Status status = Guard([&] {
    auto buffer = state_->context->createUnboundBuffer(const_cast<void*>(data), bytes);
    buffer->send(member, slot);
    transfers.items_.push_back({member, /*send=*/true, /*done=*/false, std::move(buffer)});
  });
  if (!status.ok()) {
    transfers.items_.push_back({member, true, false, nullptr});
    transfers.status_ = status;
  }
}

void GlooPeers::Receive(Transfers& transfers, int member, void* data, size_t bytes, uint64_t slot) {
  if (bytes == 0 || !transfers.status_.ok()) return;
  const absl::Status status = Guard([&] {
    auto buffer = state_->context->createUnboundBuffer(data, bytes);
    buffer->recv(member, slot);
    transfers.items_.push_back({member, /*send=*/false, /*done=*/false, std::move(buffer)});
  });
  if (!status.ok()) {
    transfers.items_.push_back({member, false, false, nullptr});
    transfers.status_ = status;
  }
}

absl::Status GlooPeers::AwaitItem(Lane lane, Transfers::Item& item, absl::Time deadline,
                                  bool* late) {
  State& s = *state_;
  State::Waiting& waiting = s.waiting[static_cast<int>(lane)];
  *late = false;
  {
    absl::MutexLock lock(&s.mutex);
    if (s.aborted) return absl::AbortedError("aborted");
    waiting = {item.buffer.get(), item.member, item.send, deadline, absl::Now() + kProbePeriod, {}};
    if (std::min(waiting.deadline, waiting.next_probe) < s.wakes) s.changed.SignalAll();
  }
  bool completed = false;
  const absl::Status status = Guard([&] {
    completed = item.send ? item.buffer->waitSend(nullptr, kForever)
                          : item.buffer->waitRecv(nullptr, kForever);
  });
  absl::MutexLock lock(&s.mutex);
  waiting.buffer = nullptr;
  item.done = status.ok() && completed;
  if (item.done) return absl::OkStatus();
  if (s.aborted) return absl::AbortedError("aborted");
  if (!status.ok()) return status;
  *late = absl::IsDeadlineExceeded(waiting.end);
  return waiting.end;
}

absl::Status GlooPeers::Await(Lane lane, Transfers& transfers, absl::Time deadline, int* origin) {
  State& s = *state_;
  *origin = s.rank;
  const char* const lane_name = lane == Lane::kGradients ? "gradients" : "moments";
  absl::Status status = transfers.status_;
  int member = transfers.items_.empty() ? s.rank : transfers.items_.back().member;
  bool late = false;
  for (Transfers::Item& item : transfers.items_) {
    if (!status.ok()) break;
    if (item.done) continue;
    member = item.member;
    status = AwaitItem(lane, item, deadline, &late);
  }
  if (status.ok()) {
    transfers.items_.clear();
    return status;
  }
  if (absl::IsAborted(status)) return status;
  if (late) {
    // Peers hear the reason before anything closes their connections; only then may Gloo be asked,
    // with a timeout of its own, who else is missing.
    std::vector<int> missing = {member};
    const std::string first =
        absl::StrCat("no answer from ", s.Name(member), " on lane ", lane_name);
    SendGoodbyes(s.rank, first);
    for (Transfers::Item& item : transfers.items_) {
      if (item.done || item.send || item.member == member) continue;
      const absl::Status probe =
          Guard([&] { item.done = item.buffer->waitRecv(nullptr, std::chrono::milliseconds(1)); });
      if (!probe.ok() && missing.back() != item.member) missing.push_back(item.member);
    }
    std::string names;
    for (const int one : missing) absl::StrAppend(&names, names.empty() ? "" : ", ", s.Name(one));
    return absl::DeadlineExceededError(
        absl::StrCat("no answer from ", names, " on lane ", lane_name));
  }
  // The connection broke. If the peer said why, that is the cause.
  State::Farewell* farewell = s.farewells[member].get();
  bool heard = false;
  if (farewell != nullptr) {
    Guard([&] {
      heard = farewell->buffer->waitRecv(nullptr, std::chrono::milliseconds(1));
    }).IgnoreError();
  }
  if (heard && farewell->message.origin >= 0 &&
      farewell->message.origin < static_cast<int>(s.names.size())) {
    *origin = farewell->message.origin;
    return absl::AbortedError(std::string(
        farewell->message.reason, strnlen(farewell->message.reason, sizeof(Goodbye::reason))));
  }
  return absl::UnavailableError(absl::StrCat("lost the connection to ", s.Name(member), " on lane ",
                                             lane_name, ": ", status.message()));
}

void GlooPeers::SendGoodbyes(int origin, const std::string& reason) {
  State& s = *state_;
  if (!s.connected) return;
  {
    absl::MutexLock lock(&s.mutex);
    if (s.said_goodbye) return;
    s.said_goodbye = true;
  }
  s.goodbye.origin = origin;
  memcpy(s.goodbye.reason, reason.data(), std::min(reason.size(), sizeof(Goodbye::reason)));
  int sent = 0;
  for (const int member : s.remote) {
    if (Guard([&] { s.goodbye_buffer->send(member, kGoodbyeSlot); }).ok()) ++sent;
  }
  // The receives were posted at Connect, so this is one write each; a peer that is gone or stopped
  // costs at most the patience.
  Guard([&] {
    while (sent-- > 0) s.goodbye_buffer->waitSend(nullptr, kGoodbyePatience);
  }).IgnoreError();
}

void GlooPeers::Abort(int origin, const std::string& reason) {
  State& s = *state_;
  {
    absl::MutexLock lock(&s.mutex);
    if (s.aborted) return;
    s.aborted = true;
    for (State::Waiting& waiting : s.waiting) {
      if (waiting.buffer != nullptr) waiting.Interrupt();
    }
  }
  SendGoodbyes(origin, reason);
  for (const int member : s.remote) {
    Guard([&] { s.context->getPair(member)->close(); }).IgnoreError();
  }
}

void GlooPeers::PartFromPeers() {
  // Closing a socket with unread bytes resets it and drops what is still on its way to the peer:
  // both ends say that they are through first.
  State& s = *state_;
  {
    absl::MutexLock lock(&s.mutex);
    if (s.aborted || !s.connected) return;
  }
  char ours = 0;
  std::vector<char> theirs(s.names.size());
  Transfers parting;
  for (const int member : s.remote) {
    Receive(parting, member, &theirs[member], 1, kPartingSlot);
    Send(parting, member, &ours, 1, kPartingSlot);
  }
  int origin = 0;
  Await(Lane::kGradients, parting, absl::Now() + kPartingPatience, &origin).IgnoreError();
}

}  // namespace lockstep::collective
