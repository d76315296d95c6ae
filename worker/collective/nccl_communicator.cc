#include "worker/collective/nccl_communicator.h"

#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/status_macros.h"
#include "worker/device/cuda/cuda_status.h"
#include "worker/device/cuda/cuda_stream.h"

namespace lockstep::collective {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(50);
constexpr absl::Duration kGrace = absl::Seconds(3);         // to find out who is missing
constexpr absl::Duration kMostFarewell = absl::Seconds(5);  // that a finish may take
// Of tickets whose operation is in its stream's order.
constexpr uint64_t kInStream = uint64_t{1} << 63;
// What Allocate gives is exchanged on this lane.
constexpr int kRegisters = static_cast<int>(Lane::kGradients);

std::string VersionText(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

// Ends the process unless it is gone in time. It takes no lock and makes no call that what it
// watches may hang in.
class Watchdog {
 public:
  explicit Watchdog(absl::Duration most) : thread_([this, most] { Watch(most); }) {}
  ~Watchdog() {
    {
      absl::MutexLock lock(&mutex_);
      done_ = true;
    }
    thread_.join();
  }

 private:
  void Watch(absl::Duration most) {
    absl::MutexLock lock(&mutex_);
    if (mutex_.AwaitWithTimeout(absl::Condition(&done_), most)) return;
    std::fprintf(stderr,
                 "NCCL's abort has not come back in %g s: this process ends, so that its GPU is "
                 "free again\n",
                 absl::ToDoubleSeconds(most));
    _exit(70);
  }

  absl::Mutex mutex_;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // the last, which uses the others
};

}  // namespace

NcclCommunicator::NcclCommunicator(const NcclApi& api, NcclOptions options,
                                   std::unique_ptr<Communicator> host)
    : api_(api), options_(std::move(options)), host_(std::move(host)) {}

absl::StatusOr<std::unique_ptr<Communicator>> NcclCommunicator::Connect(
    const NcclOptions& options, std::unique_ptr<Communicator> host, absl::Time deadline,
    Aborted aborted) {
  ASSIGN_OR_RETURN(const NcclApi* api, FindNccl());
  auto communicator = absl::WrapUnique(new NcclCommunicator(*api, options, std::move(host)));
  RETURN_IF_ERROR(communicator->Initialize(deadline, aborted));
  return communicator;
}

absl::Status NcclCommunicator::Initialize(absl::Time deadline, Aborted aborted) {
  RETURN_IF_ERROR(
      device::cuda::ToStatus(device::cuda::UseGpu(options_.gpu), "connecting over NCCL"));
  if (options_.unique_id.size() != kLanes * sizeof(ncclUniqueId)) {
    return absl::InvalidArgumentError("the identifiers of NCCL's communicators are damaged");
  }
  const absl::Time began = absl::Now();
  ncclResult_t result = ncclSuccess;
  absl::Status cause;
  for (int lane = 0; lane < kLanes && result == ncclSuccess; ++lane) {
    ncclUniqueId id;
    const char* const bytes = options_.unique_id.data() + lane * sizeof(id);
    std::copy(bytes, bytes + sizeof(id), id.internal);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    {
      absl::MutexLock lock(&calls_);
      result = api_.CommInitRankConfig(&comms_[lane], size(), id, rank(), &config);
    }
    while (result == ncclInProgress && absl::Now() < deadline && (cause = aborted()).ok()) {
      absl::SleepFor(absl::Milliseconds(1));
      absl::MutexLock lock(&calls_);
      result = AskFor(comms_[lane]);
    }
  }
  watcher_ = std::thread([this] { Watch(); });
  if (result != ncclSuccess && cause.ok()) {
    cause = NameMissing(
        result == ncclInProgress
            ? absl::UnavailableError(absl::StrCat("NCCL did not connect the members within ",
                                                  absl::ToInt64Seconds(absl::Now() - began), " s"))
            : ToStatus(result, "connecting"));
  }
  if (!cause.ok()) {
    Fail(cause);
    return cause;
  }
  ASSIGN_OR_RETURN(float* const memory, TakeMemory(options_.memory_bytes));
  memory_ = reinterpret_cast<std::byte*>(memory);
  ASSIGN_OR_RETURN(staging_, TakeMemory(options_.staging_bytes));
  return absl::OkStatus();
}

NcclCommunicator::~NcclCommunicator() {
  {
    absl::MutexLock lock(&mutex_);
    closing_ = true;
  }
  if (watcher_.joinable()) watcher_.join();
  device::cuda::UseGpu(options_.gpu);
  absl::MutexLock lock(&calls_);
  for (int lane = 0; lane < kLanes; ++lane) {
    const ncclComm_t comm = std::exchange(comms_[lane], nullptr);
    if (comm == nullptr) continue;
    for (const auto& [memory, handle] : registered_) {
      if (handle != nullptr && lane == kRegisters) api_.CommDeregister(comm, handle);
    }
    ncclResult_t result = api_.CommFinalize(comm);
    const absl::Time deadline = absl::Now() + kMostFarewell;
    while (result == ncclInProgress && absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(1));
      if (api_.CommGetAsyncError(comm, &result) != ncclSuccess) break;
    }
    if (result == ncclSuccess) {
      api_.CommDestroy(comm);
    } else {
      const Watchdog watchdog(options_.most_abort);
      api_.CommAbort(comm);
    }
  }
  for (const auto& [memory, handle] : registered_) api_.MemFree(memory);
}

absl::StatusOr<float*> NcclCommunicator::TakeMemory(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* memory = nullptr;
  ncclResult_t result = api_.MemAlloc(&memory, bytes);
  if (result != ncclSuccess) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "NCCL: ", bytes,
        " bytes of GPU memory for the exchange of gradients: ", api_.GetErrorString(result)));
  }
  registered_.emplace_back(memory, nullptr);
  cudaError_t error = cudaMemset(memory, 0, bytes);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  RETURN_IF_ERROR(device::cuda::ToStatus(error, "clearing the memory of the exchange"));
  absl::MutexLock lock(&calls_);
  if (comms_[kRegisters] == nullptr) return failure();
  result = api_.CommRegister(comms_[kRegisters], memory, bytes, &registered_.back().second);
  if (result != ncclSuccess && result != ncclInProgress) return ToStatus(result, "registering");
  return static_cast<float*>(memory);
}

absl::StatusOr<void*> NcclCommunicator::Allocate(size_t bytes) {
  constexpr size_t kAlignment = 64;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const size_t left = options_.memory_bytes - allocated_;
  if (rounded < bytes || rounded > left) {
    return absl::ResourceExhaustedError(
        absl::StrCat("asked for ", bytes, " bytes of communicator memory, ", left, " of the ",
                     options_.memory_bytes, " announced are left"));
  }
  void* const memory = memory_ + allocated_;
  allocated_ += rounded;
  return memory;
}

bool NcclCommunicator::Owns(const void* memory, int64_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(memory);
  return bytes >= 0 && begin >= memory_ && begin <= memory_ + allocated_ &&
         bytes <= memory_ + allocated_ - begin;
}

// ---- operations, in the order of a stream.

ncclResult_t NcclCommunicator::AskFor(ncclComm_t comm) {
  ncclResult_t state = ncclSuccess;
  const ncclResult_t asked = api_.CommGetAsyncError(comm, &state);
  return asked == ncclSuccess ? state : asked;
}

absl::Status NcclCommunicator::Group(Lane lane, absl::FunctionRef<ncclResult_t(ncclComm_t)> calls) {
  RETURN_IF_ERROR(failure());
  const auto at = static_cast<size_t>(lane);
  if (lane == Lane::kMoments) moments_.store(true, std::memory_order_relaxed);
  ncclResult_t result;
  {
    absl::MutexLock lock(&calls_);
    if (comms_[at] == nullptr) return failure();
    result = api_.GroupStart();
    if (result == ncclSuccess) {
      result = calls(comms_[at]);
      const ncclResult_t ended = api_.GroupEnd();
      if (result == ncclSuccess || result == ncclInProgress) result = ended;
    }
  }
  // The stream may be touched again when the group is in it.
  while (result == ncclInProgress) {
    RETURN_IF_ERROR(failure());
    absl::MutexLock lock(&calls_);
    if (comms_[at] == nullptr) return failure();
    result = AskFor(comms_[at]);
  }
  if (result == ncclSuccess) return absl::OkStatus();
  const absl::Status failure = ToStatus(result, "enqueueing an exchange");
  Fail(failure);
  return failure;
}

absl::StatusOr<Ticket> NcclCommunicator::EnqueueExchange(
    device::Stream* stream, Lane lane, absl::Span<const float* const> mine,
    absl::Span<const int> parts, int64_t count, std::vector<std::vector<const float*>>* views) {
  if (stream == nullptr || count < 0 || static_cast<int>(parts.size()) != size() ||
      static_cast<size_t>(parts[rank()]) != mine.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("exchange of ", count, " elements: ", mine.size(), " parts offered, ",
                     parts.size(), " members' numbers of parts given for ", size(),
                     stream == nullptr ? " members, without a stream" : " members"));
  }
  for (const float* part : mine) {
    if (Owns(part, count * static_cast<int64_t>(sizeof(float)))) continue;
    return absl::InvalidArgumentError("a part of an exchange is not in memory of Allocate");
  }
  const auto begin = [&](int member) { return ChunkBegin(count, size(), member); };
  const auto length = [&](int member) { return begin(member + 1) - begin(member); };
  const int64_t own = length(rank());
  int64_t staged = 0;
  views->resize(size());
  for (int member = 0; member < size(); ++member) {
    std::vector<const float*>& view = (*views)[member];
    view.clear();
    for (int part = 0; part < parts[member]; ++part) {
      if (member == rank()) {
        view.push_back(mine[part] + begin(rank()));
      } else {
        view.push_back(staging_ + staged);
        staged += own;
      }
    }
  }
  if (staged * sizeof(float) > options_.staging_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("an exchange brings ", staged,
                                                     " elements, announced were ",
                                                     options_.staging_bytes, " bytes"));
  }
  const cudaStream_t queue = device::cuda::QueueOf(*stream).stream;
  RETURN_IF_ERROR(Group(lane, [&](ncclComm_t comm) {
    ncclResult_t result = ncclSuccess;
    const auto note = [&result](ncclResult_t one) {
      if (one != ncclSuccess && one != ncclInProgress) result = one;
    };
    for (int member = 0; member < size(); ++member) {
      if (member == rank()) continue;
      for (const float* part : mine) {
        note(api_.Send(part + begin(member), length(member), ncclFloat, member, comm, queue));
      }
      for (const float* view : (*views)[member]) {
        note(api_.Recv(const_cast<float*>(view), own, ncclFloat, member, comm, queue));
      }
    }
    return result;
  }));
  sent_.exchange_bytes += mine.size() * (count - own) * sizeof(float);
  return Ticket{lane, kInStream};
}

absl::StatusOr<Ticket> NcclCommunicator::EnqueueGather(device::Stream* stream, Lane lane,
                                                       float* data, int64_t count, bool) {
  if (stream == nullptr || count < 0 || !Owns(data, count * static_cast<int64_t>(sizeof(float)))) {
    return absl::InvalidArgumentError(absl::StrCat(
        "gather of ", count,
        " elements: ", stream == nullptr ? "without a stream" : "not in memory of Allocate"));
  }
  std::vector<int64_t> bounds;
  for (int member = 0; member <= size(); ++member) {
    bounds.push_back(ChunkBegin(count, size(), member));
  }
  RETURN_IF_ERROR(GatherInPlace(*stream, lane, reinterpret_cast<std::byte*>(data), bounds,
                                ncclFloat, sizeof(float)));
  sent_.gather_bytes += (size() - 1) * (bounds[rank() + 1] - bounds[rank()]) * sizeof(float);
  return Ticket{lane, kInStream};
}

absl::StatusOr<Ticket> NcclCommunicator::EnqueueGatherBlocks(device::Stream& stream, Lane lane,
                                                             void* data,
                                                             absl::Span<const int64_t> bounds) {
  if (std::ssize(bounds) != size() + 1 || !std::is_sorted(bounds.begin(), bounds.end())) {
    return absl::InvalidArgumentError("a gather of blocks that are not one of each member");
  }
  RETURN_IF_ERROR(
      GatherInPlace(stream, lane, static_cast<std::byte*>(data), bounds, ncclInt8, /*bytes=*/1));
  sent_.small_bytes += (size() - 1) * (bounds[rank() + 1] - bounds[rank()]);
  return Ticket{lane, kInStream};
}

absl::Status NcclCommunicator::GatherInPlace(device::Stream& stream, Lane lane, std::byte* data,
                                             absl::Span<const int64_t> bounds, ncclDataType_t type,
                                             int64_t element_bytes) {
  const cudaStream_t queue = device::cuda::QueueOf(stream).stream;
  const auto length = [&](int member) { return bounds[member + 1] - bounds[member]; };
  const auto at = [&](int member) { return data + bounds[member] * element_bytes; };
  bool equal = true;
  for (int member = 1; member < size(); ++member) equal = equal && length(member) == length(0);
  return Group(lane, [&](ncclComm_t comm) {
    if (equal) return api_.AllGather(at(rank()), at(0), length(0), type, comm, queue);
    ncclResult_t result = ncclSuccess;
    const auto note = [&result](ncclResult_t one) {
      if (one != ncclSuccess && one != ncclInProgress) result = one;
    };
    for (int member = 0; member < size(); ++member) {
      if (member == rank()) continue;
      if (length(rank()) > 0) {
        note(api_.Send(at(rank()), length(rank()), type, member, comm, queue));
      }
      if (length(member) > 0)
        note(api_.Recv(at(member), length(member), type, member, comm, queue));
    }
    return result;
  });
}

absl::StatusOr<Ticket> NcclCommunicator::EnqueueLibrarySum(device::Stream& stream, Lane lane,
                                                           float* data, int64_t count) {
  const cudaStream_t queue = device::cuda::QueueOf(stream).stream;
  RETURN_IF_ERROR(Group(lane, [&](ncclComm_t comm) {
    return api_.AllReduce(data, data, count, ncclFloat, ncclSum, comm, queue);
  }));
  // As a ring does it, in each direction.
  sent_.exchange_bytes += count * sizeof(float) * (size() - 1) / size();
  sent_.gather_bytes += count * sizeof(float) * (size() - 1) / size();
  return Ticket{lane, kInStream};
}

absl::StatusOr<Ticket> NcclCommunicator::EnqueueAllGather(device::Stream* stream, Lane lane,
                                                          const void* mine, size_t bytes,
                                                          void* all) {
  if (stream == nullptr) return host_->EnqueueAllGather(nullptr, lane, mine, bytes, all);
  const cudaStream_t queue = device::cuda::QueueOf(*stream).stream;
  RETURN_IF_ERROR(Group(lane, [&](ncclComm_t comm) {
    return api_.AllGather(mine, all, bytes, ncclInt8, comm, queue);
  }));
  sent_.small_bytes += (size() - 1) * bytes;
  return Ticket{lane, kInStream};
}

absl::StatusOr<Ticket> NcclCommunicator::EnqueueBroadcast(device::Stream* stream, Lane lane,
                                                          int root, void* data, size_t bytes) {
  if (stream == nullptr) return host_->EnqueueBroadcast(nullptr, lane, root, data, bytes);
  if (root < 0 || root >= size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("broadcast from member ", root, ", accepted: 0 to ", size() - 1));
  }
  const cudaStream_t queue = device::cuda::QueueOf(*stream).stream;
  RETURN_IF_ERROR(Group(lane, [&](ncclComm_t comm) {
    return api_.Broadcast(data, data, bytes, ncclInt8, root, comm, queue);
  }));
  if (root == rank()) sent_.broadcast_bytes += (size() - 1) * bytes;
  return Ticket{lane, kInStream};
}

absl::Status NcclCommunicator::Wait(const Ticket& ticket, absl::Time deadline) {
  RETURN_IF_ERROR(failure());
  if ((ticket.sequence & kInStream) != 0) return absl::OkStatus();
  const absl::Status status = host_->Wait(ticket, deadline);
  if (!status.ok()) Fail(status);
  return status.ok() ? status : failure();
}

void NcclCommunicator::Expect(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  expected_ = deadline;
  expected_since_ = absl::Now();
}

absl::Status NcclCommunicator::Settle() {
  absl::MutexLock lock(&mutex_);
  expected_ = absl::InfiniteFuture();
  return failure_;
}

void NcclCommunicator::Abort(const absl::Status& cause) {
  Fail(absl::AbortedError(cause.message()));
}

Traffic NcclCommunicator::traffic() const {
  Traffic traffic = host_->traffic();
  traffic.exchange_bytes += sent_.exchange_bytes;
  traffic.gather_bytes += sent_.gather_bytes;
  traffic.small_bytes += sent_.small_bytes;
  traffic.broadcast_bytes += sent_.broadcast_bytes;
  return traffic;
}

// ---- failure.

absl::Status NcclCommunicator::ToStatus(ncclResult_t result, absl::string_view what) {
  std::string text = absl::StrCat("NCCL: ", what, ": ", api_.GetErrorString(result));
  const char* const last = api_.GetLastError(nullptr);
  if (last != nullptr && *last != '\0') absl::StrAppend(&text, " (", last, ")");
  return result == ncclRemoteError || result == ncclSystemError ? absl::UnavailableError(text)
                                                                : absl::InternalError(text);
}

void NcclCommunicator::Fail(const absl::Status& failure) {
  absl::Status first;
  {
    absl::MutexLock lock(&mutex_);
    if (poison_ != nullptr) std::atomic_ref<uint32_t>(*poison_).store(1);
    if (failure_.ok()) failure_ = failure;
    first = failure_;
  }
  host_->Abort(first);
}

void NcclCommunicator::PoisonOnFailure(uint32_t* word) {
  absl::MutexLock lock(&mutex_);
  poison_ = word;
  if (poison_ != nullptr && !failure_.ok()) std::atomic_ref<uint32_t>(*poison_).store(1);
}

absl::Status NcclCommunicator::failure() const {
  absl::MutexLock lock(&mutex_);
  return failure_;
}

// Which of the lanes it is only the devices know.
absl::Status NcclCommunicator::TimedOut(absl::Duration waited) {
  const absl::Status failure = NameMissing(absl::DeadlineExceededError(absl::StrCat(
      "the exchange of gradients", moments_.load(std::memory_order_relaxed) ? " or moments" : "",
      " over NCCL has not ended within ", std::llround(absl::ToDoubleSeconds(waited)), " s")));
  return absl::Status(
      failure.code(),
      absl::StrCat(failure.message(),
                   "; look at the members' GPUs and the links between them (NCCL_DEBUG=INFO tells "
                   "what NCCL does), or allow more time with lockstep-worker's "
                   "--collective-timeout"));
}

absl::Status NcclCommunicator::NameMissing(const absl::Status& problem) {
  const char here = 1;
  std::string all(size(), '\0');
  // The host's lane of gradients is for this alone.
  const auto ticket = host_->EnqueueAllGather(nullptr, Lane::kGradients, &here, 1, all.data());
  const absl::Status answers =
      ticket.ok() ? host_->Wait(*ticket, absl::Now() + kGrace) : ticket.status();
  if (answers.ok()) {
    return absl::Status(problem.code(), absl::StrCat(problem.message(), "; all members answer"));
  }
  return absl::Status(answers.code(), absl::StrCat(problem.message(), "; ", answers.message()));
}

void NcclCommunicator::Watch() {
  device::cuda::UseGpu(options_.gpu);
  const auto ended = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return closing_ || !failure_.ok();
  };
  for (;;) {
    absl::Time expected, since;
    {
      absl::MutexLock lock(&mutex_);
      if (mutex_.AwaitWithTimeout(absl::Condition(&ended), kPoll)) break;
      expected = expected_;
      since = expected_since_;
    }
    if (expected == absl::InfiniteFuture()) continue;
    ncclResult_t state = ncclSuccess;
    // A call that hangs must not keep the deadline from passing.
    if (calls_.TryLock()) {
      for (const ncclComm_t comm : comms_) {
        if (comm == nullptr) continue;
        if (state == ncclSuccess || state == ncclInProgress) state = AskFor(comm);
      }
      calls_.Unlock();
    }
    if (state != ncclSuccess && state != ncclInProgress) {
      Fail(NameMissing(ToStatus(state, "exchanging gradients")));
    } else if (absl::Now() > expected) {
      Fail(TimedOut(expected - since));
    }
  }
  if (!failure().ok()) AbortAll();
}

void NcclCommunicator::AbortAll() {
  const Watchdog watchdog(options_.most_abort);
  Comms comms;
  {
    absl::MutexLock lock(&calls_);
    comms = std::exchange(comms_, {});
  }
  // Together: one waits for its kernels, which may be behind another's on a stream.
  std::vector<std::thread> aborts;
  for (const ncclComm_t comm : comms) {
    if (comm == nullptr) continue;
    aborts.emplace_back([this, comm] {
      device::cuda::UseGpu(options_.gpu);
      api_.CommAbort(comm);
    });
  }
  for (std::thread& abort : aborts) abort.join();
}

// ---- the module.

namespace {

absl::StatusOr<std::string> Version() {
  ASSIGN_OR_RETURN(const NcclApi* api, FindNccl());
  int version = 0;
  const ncclResult_t result = api->GetVersion(&version);
  if (result == ncclSuccess) return VersionText(version);
  return absl::InternalError(absl::StrCat("NCCL: its version: ", api->GetErrorString(result)));
}

absl::StatusOr<std::string> NewUniqueId() {
  ASSIGN_OR_RETURN(const NcclApi* api, FindNccl());
  std::string ids;
  for (int lane = 0; lane < kLanes; ++lane) {
    ncclUniqueId id;
    const ncclResult_t result = api->GetUniqueId(&id);
    if (result != ncclSuccess) {
      return absl::InternalError(
          absl::StrCat("NCCL: making an identifier: ", api->GetErrorString(result)));
    }
    ids.append(id.internal, sizeof(id.internal));
  }
  return ids;
}

void ShareGpu(const std::string& host) {
  // As NCCL reads them, once.
  setenv("NCCL_HOSTID", host.c_str(), 1);
  for (const auto& [name, value] :
       std::initializer_list<std::pair<const char*, const char*>>{{"NCCL_NET", "Socket"},
                                                                  {"NCCL_SOCKET_IFNAME", "=lo"},
                                                                  {"NCCL_ALGO", "Ring"},
                                                                  {"NCCL_PROTO", "Simple"},
                                                                  {"NCCL_MAX_CTAS", "2"},
                                                                  {"NCCL_NVLS_ENABLE", "0"},
                                                                  {"NCCL_RAS_ENABLE", "0"}}) {
    setenv(name, value, 0);
  }
}

}  // namespace

const NcclModule* GetNcclModule() {
  static const NcclModule module = {Version, NewUniqueId, ShareGpu, NcclCommunicator::Connect};
  return &module;
}

}  // namespace lockstep::collective
