#include "worker/collective/mesh_communicator.h"

#include <string.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace lockstep::collective {
namespace {

using Mark = SharedPeers::Mark;

constexpr size_t kAlignment = 64;
constexpr size_t kPieceBytes = 1 << 20;  // of a broadcast
static_assert(kPieceBytes <= Communicator::kSmallBytes);

const char* LaneName(Lane lane) { return lane == Lane::kGradients ? "gradients" : "moments"; }

// Nothing may be copied from or to null.
void Copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) memmove(to, from, bytes);
}

// Between two members; above bit 8 unique to the operation.
uint64_t GlooSlot(Lane lane, uint64_t sequence, int part) {
  return static_cast<uint64_t>(lane) << 62 | sequence << 8 | static_cast<uint64_t>(part);
}

}  // namespace

MeshCommunicator::MeshCommunicator(int rank, std::vector<MemberInfo> members,
                                   std::vector<std::shared_ptr<Segment>> segments, int spin,
                                   std::unique_ptr<GlooPeers> gloo)
    : rank_(rank),
      members_(std::move(members)),
      shared_(rank, std::move(segments), spin),
      gloo_(std::move(gloo)) {}

absl::StatusOr<void*> MeshCommunicator::Allocate(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const size_t left = shared_.own().data_bytes() - allocated_;
  if (rounded < bytes || rounded > left) {
    return absl::ResourceExhaustedError(
        absl::StrCat("asked for ", bytes, " bytes of communicator memory, ", left, " of the ",
                     shared_.own().data_bytes(), " announced at rendezvous are left"));
  }
  void* memory = shared_.own().data() + allocated_;
  allocated_ += rounded;
  return memory;
}

bool MeshCommunicator::Owns(const void* begin, int64_t bytes) const {
  auto& own = const_cast<SharedPeers&>(shared_).own();
  const auto* address = static_cast<const std::byte*>(begin);
  return bytes >= 0 && address >= own.data() && address <= own.data() + allocated_ &&
         bytes <= own.data() + allocated_ - address;
}

uint64_t MeshCommunicator::Offset(const void* mine) const {
  return static_cast<const std::byte*>(mine) - const_cast<SharedPeers&>(shared_).own().data();
}

void* MeshCommunicator::Peer(int rank, void* mine) {
  return shared_.shares(rank) ? shared_.peer(rank).data() + Offset(mine) : nullptr;
}

std::string MeshCommunicator::Name(int member) const {
  return absl::StrCat("member ", member, " (", members_[member].name, ")");
}

// ---- enqueue

std::unique_ptr<MeshCommunicator::Operation> MeshCommunicator::NewOperation(Lane lane, Kind kind,
                                                                            uint64_t numbers) {
  LaneState& s = state(lane);
  std::unique_ptr<Operation> operation;
  if (s.spare.empty()) {
    operation = std::make_unique<Operation>();
    operation->transfers = std::make_unique<GlooPeers::Transfers>();
  } else {
    operation = std::move(s.spare.back());
    s.spare.pop_back();
  }
  operation->kind = kind;
  operation->posted = false;
  operation->first = s.enqueued + 1;
  s.enqueued += numbers;
  operation->last = s.enqueued;
  return operation;
}

Ticket MeshCommunicator::Enqueue(Lane lane, std::unique_ptr<Operation> operation) {
  LaneState& s = state(lane);
  const Ticket ticket{lane, operation->last};
  const bool next = s.queue.empty() || s.queue.back()->posted;
  s.queue.push_back(std::move(operation));
  Operation& added = *s.queue.back();
  if (next && added.kind != Kind::kBroadcast && !failed_ && MayPost(lane, added, added.first)) {
    Post(lane, added);
  }
  return ticket;
}

absl::StatusOr<Ticket> MeshCommunicator::EnqueueExchange(
    device::Stream* /*stream*/, Lane lane, absl::Span<const float* const> mine,
    absl::Span<const int> parts, int64_t count, std::vector<std::vector<const float*>>* views) {
  if (count < 0 || static_cast<int>(parts.size()) != size() || parts[rank_] < 0 ||
      static_cast<size_t>(parts[rank_]) != mine.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("exchange of ", count, " elements: ", mine.size(), " parts offered, ",
                     parts.size(), " members' numbers of parts given for ", size(), " members"));
  }
  for (const int number : parts) {
    if (number >= 0 && number <= Descriptor::kMaxParts) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("a member offers ", number, " parts, accepted: 0 to ", Descriptor::kMaxParts));
  }
  for (const float* part : mine) {
    if (Owns(part, count * sizeof(float))) continue;
    return absl::InvalidArgumentError("a part of an exchange is not in memory of Allocate");
  }
  auto operation = NewOperation(lane, Kind::kExchange, 1);
  operation->count = count;
  operation->offered.assign(mine.begin(), mine.end());
  operation->parts.assign(parts.begin(), parts.end());
  operation->views = views;
  return Enqueue(lane, std::move(operation));
}

absl::StatusOr<Ticket> MeshCommunicator::EnqueueGather(device::Stream* /*stream*/, Lane lane,
                                                       float* data, int64_t count, bool delivered) {
  if (count < 0 || !Owns(data, count * sizeof(float))) {
    return absl::InvalidArgumentError(
        absl::StrCat("gather of ", count, " elements: not in memory of Allocate"));
  }
  auto operation = NewOperation(lane, delivered ? Kind::kDelivered : Kind::kGather, 1);
  operation->count = count;
  operation->data = data;
  return Enqueue(lane, std::move(operation));
}

absl::StatusOr<Ticket> MeshCommunicator::EnqueueAllGather(device::Stream* /*stream*/, Lane lane,
                                                          const void* mine, size_t bytes,
                                                          void* all) {
  if (bytes > kSmallBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("all-gather of ", bytes, " bytes, accepted: at most ", kSmallBytes));
  }
  auto operation = NewOperation(lane, Kind::kAllGather, 1);
  operation->count = static_cast<int64_t>(bytes);
  operation->mine = mine;
  operation->data = all;
  return Enqueue(lane, std::move(operation));
}

absl::StatusOr<Ticket> MeshCommunicator::EnqueueBroadcast(device::Stream* /*stream*/, Lane lane,
                                                          int root, void* data, size_t bytes) {
  if (root < 0 || root >= size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("broadcast from member ", root, ", accepted: 0 to ", size() - 1));
  }
  const uint64_t pieces = std::max<uint64_t>(1, (bytes + kPieceBytes - 1) / kPieceBytes);
  auto operation = NewOperation(lane, Kind::kBroadcast, pieces);
  operation->count = static_cast<int64_t>(bytes);
  operation->root = root;
  operation->data = data;
  return Enqueue(lane, std::move(operation));
}

// ---- posting

uint64_t MeshCommunicator::MustBeFinished(Lane lane, const Operation& operation,
                                          uint64_t sequence) {
  const uint64_t ring = SegmentControl::kDescriptors;
  uint64_t finished = sequence > ring ? sequence - ring : 0;
  const bool stages = operation.kind == Kind::kAllGather || operation.kind == Kind::kBroadcast;
  if (stages) finished = std::max(finished, state(lane).staged[sequence % 2]);
  return finished;
}

bool MeshCommunicator::MayPost(Lane lane, const Operation& operation, uint64_t sequence) {
  const uint64_t finished = MustBeFinished(lane, operation, sequence);
  return std::all_of(shared_.peers().begin(), shared_.peers().end(), [&](int member) {
    return shared_.Reached(lane, member, Mark::kFinished, finished);
  });
}

absl::Status MeshCommunicator::AwaitMayPost(Lane lane, const Operation& operation,
                                            uint64_t sequence, absl::Time deadline) {
  std::vector<int> missing;
  const auto outcome = shared_.AwaitAll(
      lane, Mark::kFinished, MustBeFinished(lane, operation, sequence), deadline, &missing);
  return outcome == SharedPeers::Outcome::kReached ? absl::OkStatus()
                                                   : Missing(lane, outcome, missing);
}

void MeshCommunicator::Describe(Lane lane, const Operation& operation, uint64_t sequence) {
  Descriptor& descriptor = shared_.own().descriptor(lane, sequence);
  descriptor.kind = static_cast<uint32_t>(operation.kind);
  descriptor.size = static_cast<uint64_t>(operation.count);
  descriptor.parts = 0;
  if (operation.kind == Kind::kExchange) {
    for (const float* part : operation.offered) {
      descriptor.offset[descriptor.parts++] = Offset(part);
    }
  } else if (operation.kind == Kind::kGather) {
    descriptor.offset[descriptor.parts++] = Offset(operation.data);
  }
}

void MeshCommunicator::Post(Lane lane, Operation& operation) {
  operation.posted = true;
  if (!shared_.peers().empty()) {
    Describe(lane, operation, operation.first);
    if (operation.kind == Kind::kAllGather) {
      Copy(shared_.own().staging(lane, operation.first), operation.mine, operation.count);
      state(lane).staged[operation.first % 2] = operation.first;
    }
    shared_.Raise(lane, Mark::kPosted, operation.first);
  }
  // Traffic of an operation, whatever the link.
  const int64_t others = size() - 1;
  if (operation.kind == Kind::kExchange) {
    const int64_t own_chunk =
        ChunkBegin(operation.count, size(), rank_ + 1) - ChunkBegin(operation.count, size(), rank_);
    sent_.exchange += operation.offered.size() * (operation.count - own_chunk) * sizeof(float);
  } else if (operation.kind == Kind::kAllGather) {
    sent_.small += others * operation.count;
  } else if (operation.kind != Kind::kBroadcast) {
    sent_.gather += others * sizeof(float) *
                    (ChunkBegin(operation.count, size(), rank_ + 1) -
                     ChunkBegin(operation.count, size(), rank_));
  }
  if (gloo_ != nullptr) PostToOtherHosts(lane, operation);
}

void MeshCommunicator::PostToOtherHosts(Lane lane, Operation& operation) {
  GlooPeers::Transfers& transfers = *operation.transfers;
  const uint64_t sequence = operation.first;
  const auto begin = [&](int member) { return ChunkBegin(operation.count, size(), member); };
  const auto bytes = [&](int member) {
    return (begin(member + 1) - begin(member)) * sizeof(float);
  };
  switch (operation.kind) {
    case Kind::kExchange: {
      const int64_t chunk = begin(rank_ + 1) - begin(rank_);
      int64_t total = 0;
      for (const int member : gloo_->peers()) total += operation.parts[member] * chunk;
      operation.received.resize(total);
      float* to = operation.received.data();
      for (const int member : gloo_->peers()) {
        for (int part = 0; part < operation.parts[member]; ++part, to += chunk) {
          gloo_->Receive(transfers, member, to, chunk * sizeof(float),
                         GlooSlot(lane, sequence, part));
        }
      }
      for (const int member : gloo_->peers()) {
        for (size_t part = 0; part < operation.offered.size(); ++part) {
          gloo_->Send(transfers, member, operation.offered[part] + begin(member), bytes(member),
                      GlooSlot(lane, sequence, static_cast<int>(part)));
        }
      }
      break;
    }
    case Kind::kGather:
    case Kind::kDelivered: {
      float* data = static_cast<float*>(operation.data);
      for (const int member : gloo_->peers()) {
        gloo_->Receive(transfers, member, data + begin(member), bytes(member),
                       GlooSlot(lane, sequence, 0));
      }
      for (const int member : gloo_->peers()) {
        gloo_->Send(transfers, member, data + begin(rank_), bytes(rank_),
                    GlooSlot(lane, sequence, 0));
      }
      break;
    }
    case Kind::kAllGather: {
      std::byte* all = static_cast<std::byte*>(operation.data);
      for (const int member : gloo_->peers()) {
        gloo_->Receive(transfers, member, all + member * operation.count, operation.count,
                       GlooSlot(lane, sequence, 0));
      }
      for (const int member : gloo_->peers()) {
        gloo_->Send(transfers, member, operation.mine, operation.count,
                    GlooSlot(lane, sequence, 0));
      }
      break;
    }
    case Kind::kBroadcast:
      for (const int member : gloo_->peers()) {
        if (operation.root == rank_) {
          gloo_->Send(transfers, member, operation.data, operation.count,
                      GlooSlot(lane, sequence, 0));
        } else if (operation.root == member) {
          gloo_->Receive(transfers, member, operation.data, operation.count,
                         GlooSlot(lane, sequence, 0));
        }
      }
      break;
  }
}

// ---- completing

absl::Status MeshCommunicator::Wait(const Ticket& ticket, absl::Time deadline) {
  LaneState& s = state(ticket.lane);
  if (ticket.sequence > s.enqueued) {
    return absl::InvalidArgumentError(absl::StrCat(
        "ticket ", ticket.sequence, " was never given out on lane ", LaneName(ticket.lane)));
  }
  if (failed_) return Failure();
  while (s.completed < ticket.sequence) {
    Operation& operation = *s.queue.front();
    RETURN_IF_ERROR(Complete(ticket.lane, operation, deadline));
    s.completed = operation.last;
    const Kind kind = operation.kind;
    auto& next = kind == Kind::kExchange ? s.viewed : s.queue;
    std::unique_ptr<Operation> done = std::move(s.queue.front());
    s.queue.erase(s.queue.begin());
    if (kind == Kind::kExchange) {
      next.push_back(std::move(done));
    } else {
      s.spare.push_back(std::move(done));
    }
    const bool ends_exchange = kind == Kind::kGather || kind == Kind::kDelivered;
    if (ends_exchange && !s.viewed.empty()) {
      s.spare.push_back(std::move(s.viewed.front()));
      s.viewed.erase(s.viewed.begin());
    }
    for (const auto& waiting : s.queue) {
      if (waiting->posted) continue;
      if (waiting->kind == Kind::kBroadcast) break;
      if (!MayPost(ticket.lane, *waiting, waiting->first)) break;
      Post(ticket.lane, *waiting);
    }
  }
  return absl::OkStatus();
}

absl::Status MeshCommunicator::Complete(Lane lane, Operation& operation, absl::Time deadline) {
  if (failed_) return Failure();
  if (operation.kind == Kind::kBroadcast) return CompleteBroadcast(lane, operation, deadline);
  if (!operation.posted) {
    RETURN_IF_ERROR(AwaitMayPost(lane, operation, operation.first, deadline));
    Post(lane, operation);
  }
  if (operation.kind == Kind::kExchange) return CompleteExchange(lane, operation, deadline);
  if (operation.kind == Kind::kAllGather) return CompleteAllGather(lane, operation, deadline);
  return CompleteGather(lane, operation, deadline);
}

absl::Status MeshCommunicator::CompleteExchange(Lane lane, Operation& operation,
                                                absl::Time deadline) {
  RETURN_IF_ERROR(AwaitPosted(lane, operation, deadline));
  RETURN_IF_ERROR(AwaitOtherHosts(lane, operation, deadline));
  const int64_t begin = ChunkBegin(operation.count, size(), rank_);
  const int64_t chunk = ChunkBegin(operation.count, size(), rank_ + 1) - begin;
  auto& views = *operation.views;
  views.resize(size());
  const float* received = operation.received.data();
  for (int member = 0; member < size(); ++member) {
    const int parts = operation.parts[member];
    views[member].resize(parts);
    for (int part = 0; part < parts; ++part) {
      const float*& view = views[member][part];
      if (member == rank_) {
        view = operation.offered[part] + begin;
      } else if (shared_.shares(member)) {
        const uint64_t offset = shared_.peer(member).descriptor(lane, operation.first).offset[part];
        view = reinterpret_cast<const float*>(shared_.peer(member).data() + offset) + begin;
      } else {
        view = received;
        received += chunk;
      }
    }
  }
  if (!shared_.peers().empty()) shared_.Raise(lane, Mark::kFinished, operation.first);
  return absl::OkStatus();
}

absl::Status MeshCommunicator::CompleteGather(Lane lane, Operation& operation,
                                              absl::Time deadline) {
  RETURN_IF_ERROR(AwaitPosted(lane, operation, deadline));
  if (operation.kind == Kind::kGather) {
    float* data = static_cast<float*>(operation.data);
    for (const int member : shared_.peers()) {
      const uint64_t offset = shared_.peer(member).descriptor(lane, operation.first).offset[0];
      const auto* theirs = reinterpret_cast<const float*>(shared_.peer(member).data() + offset);
      const int64_t begin = ChunkBegin(operation.count, size(), member);
      const int64_t end = ChunkBegin(operation.count, size(), member + 1);
      Copy(data + begin, theirs + begin, (end - begin) * sizeof(float));
    }
  }
  if (!shared_.peers().empty()) {
    shared_.Raise(lane, Mark::kFinished, operation.first);
    if (operation.kind == Kind::kGather) {  // our chunk may be written again only when all have it
      std::vector<int> missing;
      const auto outcome =
          shared_.AwaitAll(lane, Mark::kFinished, operation.first, deadline, &missing);
      if (outcome != SharedPeers::Outcome::kReached) return Missing(lane, outcome, missing);
    }
  }
  return AwaitOtherHosts(lane, operation, deadline);
}

absl::Status MeshCommunicator::CompleteAllGather(Lane lane, Operation& operation,
                                                 absl::Time deadline) {
  std::byte* all = static_cast<std::byte*>(operation.data);
  Copy(all + rank_ * operation.count, operation.mine, operation.count);
  RETURN_IF_ERROR(AwaitPosted(lane, operation, deadline));
  for (const int member : shared_.peers()) {
    Copy(all + member * operation.count, shared_.peer(member).staging(lane, operation.first),
         operation.count);
  }
  if (!shared_.peers().empty()) shared_.Raise(lane, Mark::kFinished, operation.first);
  return AwaitOtherHosts(lane, operation, deadline);
}

absl::Status MeshCommunicator::CompleteBroadcast(Lane lane, Operation& operation,
                                                 absl::Time deadline) {
  const bool root = operation.root == rank_;
  if (!operation.posted) {
    operation.posted = true;
    if (root) sent_.broadcast += static_cast<uint64_t>(size() - 1) * operation.count;
    if (gloo_ != nullptr) PostToOtherHosts(lane, operation);
  }
  std::byte* data = static_cast<std::byte*>(operation.data);
  const bool here = root || shared_.shares(operation.root);
  if (!here) RETURN_IF_ERROR(AwaitOtherHosts(lane, operation, deadline));
  for (uint64_t sequence = operation.first; !shared_.peers().empty() && sequence <= operation.last;
       ++sequence) {
    const size_t begin = (sequence - operation.first) * kPieceBytes;
    const size_t bytes = std::min(kPieceBytes, static_cast<size_t>(operation.count) - begin);
    if (root) {
      RETURN_IF_ERROR(AwaitMayPost(lane, operation, sequence, deadline));
      Describe(lane, operation, sequence);
      Copy(shared_.own().staging(lane, sequence), data + begin, bytes);
      state(lane).staged[sequence % 2] = sequence;
    } else {
      if (here) {
        RETURN_IF_ERROR(AwaitPosted(lane, operation.root, operation, sequence, deadline));
        Copy(data + begin, shared_.peer(operation.root).staging(lane, sequence), bytes);
      }
      // Nobody reads it of us, but a later operation's flags must not overtake it.
      Describe(lane, operation, sequence);
    }
    shared_.Raise(lane, Mark::kPosted, sequence);
    shared_.Raise(lane, Mark::kFinished, sequence);
  }
  return here ? AwaitOtherHosts(lane, operation, deadline) : absl::OkStatus();
}

absl::Status MeshCommunicator::AwaitPosted(Lane lane, const Operation& operation,
                                           absl::Time deadline) {
  std::vector<int> missing;
  const auto outcome = shared_.AwaitAll(lane, Mark::kPosted, operation.first, deadline, &missing);
  if (outcome != SharedPeers::Outcome::kReached) return Missing(lane, outcome, missing);
  for (const int member : shared_.peers()) {
    RETURN_IF_ERROR(CheckSame(lane, member, operation, operation.first));
  }
  return absl::OkStatus();
}

absl::Status MeshCommunicator::AwaitPosted(Lane lane, int member, const Operation& operation,
                                           uint64_t sequence, absl::Time deadline) {
  const auto outcome = shared_.Await(lane, member, Mark::kPosted, sequence, deadline);
  if (outcome != SharedPeers::Outcome::kReached) return Missing(lane, outcome, {member});
  return CheckSame(lane, member, operation, sequence);
}

absl::Status MeshCommunicator::CheckSame(Lane lane, int member, const Operation& operation,
                                         uint64_t sequence) {
  const Descriptor& descriptor = shared_.peer(member).descriptor(lane, sequence);
  bool same = descriptor.kind == static_cast<uint32_t>(operation.kind) &&
              descriptor.size == static_cast<uint64_t>(operation.count);
  if (operation.kind == Kind::kExchange || operation.kind == Kind::kGather) {
    const int parts = operation.kind == Kind::kExchange ? operation.parts[member] : 1;
    same = same && descriptor.parts == static_cast<uint32_t>(parts);
    const uint64_t limit = shared_.peer(member).data_bytes();
    const uint64_t bytes = operation.count * sizeof(float);
    for (uint32_t part = 0; same && part < descriptor.parts; ++part) {
      same = bytes <= limit && descriptor.offset[part] <= limit - bytes;
    }
  }
  if (same) return absl::OkStatus();
  const absl::Status status = absl::InternalError(absl::StrCat(
      Name(member), " enqueued another operation than this member (kind ", descriptor.kind, " of ",
      descriptor.size, ", here ", static_cast<uint32_t>(operation.kind), " of ", operation.count,
      ") as number ", sequence, " of lane ", LaneName(lane)));
  return Fail(status, rank_, std::string(status.message()));
}

absl::Status MeshCommunicator::AwaitOtherHosts(Lane lane, Operation& operation,
                                               absl::Time deadline) {
  if (gloo_ == nullptr) return absl::OkStatus();
  int origin = rank_;
  const absl::Status status = gloo_->Await(lane, *operation.transfers, deadline, &origin);
  if (status.ok()) return status;
  const std::string reason(status.message());
  if (origin == rank_) return Fail(status, origin, reason);
  return Fail(absl::AbortedError(absl::StrCat(Name(origin), " gave up: ", reason)), origin, reason);
}

absl::Status MeshCommunicator::Missing(Lane lane, SharedPeers::Outcome outcome,
                                       const std::vector<int>& members) {
  if (outcome == SharedPeers::Outcome::kGaveUp) {
    if (failed_) return Failure();
    if (const auto cause = shared_.PeerGaveUp(); cause.has_value()) {
      const int origin = cause->origin >= 0 && cause->origin < size() ? cause->origin : rank_;
      return Fail(absl::AbortedError(absl::StrCat(Name(origin), " gave up: ", cause->reason)),
                  origin, cause->reason);
    }
  }
  std::string names;
  for (const int member : members) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", Name(member));
  }
  const std::string reason = absl::StrCat("no answer from ", names, " on lane ", LaneName(lane));
  return Fail(absl::DeadlineExceededError(reason), rank_, reason);
}

// ---- failure

absl::Status MeshCommunicator::Failure() const {
  absl::MutexLock lock(&mutex_);
  return failure_;
}

absl::Status MeshCommunicator::Fail(const absl::Status& failure, int origin,
                                    const std::string& reason) {
  {
    absl::MutexLock lock(&mutex_);
    if (!failure_.ok()) return failure_;
    failure_ = failure;
    failed_ = true;
  }
  shared_.GiveUp(origin, reason);
  if (gloo_ != nullptr) gloo_->Abort(origin, reason);
  return failure;
}

void MeshCommunicator::Abort(const absl::Status& cause) {
  const std::string reason(cause.message());
  Fail(absl::AbortedError(reason), rank_, reason).IgnoreError();
}

Traffic MeshCommunicator::traffic() const {
  return {sent_.exchange.load(), sent_.gather.load(), sent_.small.load(), sent_.broadcast.load()};
}

}  // namespace lockstep::collective
