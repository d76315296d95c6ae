#include "worker/collective/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <new>

#include "absl/strings/str_cat.h"

namespace lockstep::collective {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t RoundUp(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
constexpr size_t kStagingOffset = RoundUp(sizeof(SegmentControl));
constexpr size_t kDataOffset = kStagingOffset + kLanes * 2 * Communicator::kSmallBytes;

// A peer's memory may be mapped anywhere, so its words must not need more than the hardware's
// atomics.
static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

absl::Status SystemError(const std::string& what, int error) {
  const std::string message = absl::StrCat(what, ": ", strerror(error));
  return error == ENOENT || error == ESRCH ? absl::UnavailableError(message)
                                           : absl::ResourceExhaustedError(message);
}

}  // namespace

Segment::Segment(void* base, size_t data_bytes, bool shared, int descriptor)
    : base_(static_cast<std::byte*>(base)),
      control_(std::launder(static_cast<SegmentControl*>(base))),
      data_(base_ + kDataOffset),
      data_bytes_(data_bytes),
      shared_(shared),
      descriptor_(descriptor) {}

Segment::~Segment() {
  CloseDescriptor();
  munmap(base_, kDataOffset + RoundUp(data_bytes_));
}

void Segment::CloseDescriptor() {
  if (descriptor_ >= 0) close(descriptor_);
  descriptor_ = -1;
}

absl::StatusOr<std::shared_ptr<Segment>> Segment::Create(size_t data_bytes, uint64_t nonce) {
  const size_t bytes = kDataOffset + RoundUp(data_bytes);
  const int fd = memfd_create("lockstep", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return SystemError("cannot make a shared memory segment (memfd_create)", errno);
  void* base = MAP_FAILED;
  if (ftruncate(fd, static_cast<off_t>(bytes)) == 0 &&
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
    base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  if (base == MAP_FAILED) {
    const int error = errno;
    close(fd);
    return SystemError(absl::StrCat("cannot map a shared memory segment of ", bytes, " bytes"),
                       error);
  }
  new (base) SegmentControl();
  std::shared_ptr<Segment> segment(new Segment(base, data_bytes, /*shared=*/true, fd));
  segment->control().nonce.store(nonce);
  return segment;
}

absl::StatusOr<std::shared_ptr<Segment>> Segment::CreatePrivate(size_t data_bytes) {
  const size_t bytes = kDataOffset + RoundUp(data_bytes);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return SystemError(absl::StrCat("cannot map ", bytes, " bytes of memory"), errno);
  }
  new (base) SegmentControl();
  return std::shared_ptr<Segment>(new Segment(base, data_bytes, /*shared=*/false, -1));
}

absl::StatusOr<std::shared_ptr<Segment>> Segment::Attach(const SegmentAddress& address) {
  const std::string path = absl::StrCat("/proc/", address.pid, "/fd/", address.descriptor);
  const size_t bytes = kDataOffset + RoundUp(address.data_bytes);
  const auto is_ours = [&](const struct stat& info) {
    return S_ISREG(info.st_mode) && info.st_ino == address.inode &&
           info.st_size == static_cast<off_t>(bytes);
  };
  const absl::Status other = absl::FailedPreconditionError(
      absl::StrCat(path,
                   " is not the segment that was announced: the process is another one, or the "
                   "announcement is stale"));
  // Looked at before it is opened: opening what has taken its place could have effects.
  struct stat info {};
  if (stat(path.c_str(), &info) != 0)
    return SystemError(absl::StrCat("cannot reach ", path), errno);
  if (!is_ours(info)) return other;
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return SystemError(absl::StrCat("cannot open ", path), errno);
  void* base = MAP_FAILED;
  const bool same = fstat(fd, &info) == 0 && is_ours(info);
  if (same) base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const int error = errno;
  close(fd);
  if (!same) return other;
  if (base == MAP_FAILED) return SystemError(absl::StrCat("cannot map ", path), error);
  std::shared_ptr<Segment> segment(new Segment(base, address.data_bytes, /*shared=*/true, -1));
  if (segment->control().nonce.load() != address.nonce) return other;
  return segment;
}

std::byte* Segment::staging(Lane lane, uint64_t sequence) {
  return base_ + kStagingOffset +
         (static_cast<int>(lane) * 2 + sequence % 2) * Communicator::kSmallBytes;
}

SegmentAddress Segment::address() const {
  struct stat info {};
  fstat(descriptor_, &info);
  return {static_cast<uint64_t>(getpid()), static_cast<uint64_t>(descriptor_), info.st_ino,
          control_->nonce.load(), data_bytes_};
}

}  // namespace lockstep::collective
