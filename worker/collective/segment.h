// The memory that one member shares with the others of its host: a control block (flags, operation
// descriptors, the word that says it gave up), staging areas for operations on foreign memory, and
// the data that Communicator::Allocate hands out. Backed by a memfd that has no name anywhere and
// is reached through /proc/<pid>/fd, or, for threads of one process, by anonymous memory.
//
// Thread safety: making and attaching only; the words inside are atomics. Ownership: the mapping
// lives as long as the Segment; a peer's death does not take it away. Invariants: 1. a segment
// belongs to one generation and is never reused; 2. its size is sealed, so that no peer can be made
// to fault by truncation; 3. only its owner writes `posted`, `finished`, descriptors and staging;
// anyone may ring `bell`.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/collective/communicator.h"

namespace lockstep::collective {

// What a member does with sequence number s of a lane, for peers that read its memory.
struct Descriptor {
  static constexpr int kMaxParts = 61;
  uint32_t kind = 0;
  uint32_t parts = 0;
  uint64_t size = 0;                // elements or bytes
  uint64_t offset[kMaxParts] = {};  // of each part from data()
};

struct LaneControl {
  // All sequence numbers up to this one are ready to be read, and have been read, respectively.
  alignas(64) std::atomic<uint32_t> posted{0};
  alignas(64) std::atomic<uint32_t> finished{0};
  // 1 + the member that the owner sleeps for; 0: awake. The owner sleeps on `bell`.
  alignas(64) std::atomic<uint32_t> awaiting{0};
  std::atomic<uint32_t> bell{0};
};

struct SegmentControl {
  static constexpr int kDescriptors = 512;  // sequence number s uses descriptor s % kDescriptors
  static constexpr size_t kReasonBytes = 480;

  std::atomic<uint64_t> nonce{0};
  std::atomic<uint32_t> joined{0};  // futex: the owner has attached to all its peers
  // 0, 1 while it is being written, 2: the owner gave up; who was first to, and why.
  alignas(64) std::atomic<uint32_t> gave_up{0};
  int32_t origin = 0;
  char reason[kReasonBytes] = {};
  LaneControl lanes[kLanes];
  Descriptor descriptors[kLanes][kDescriptors];
};

// Where a peer finds a shared segment.
struct SegmentAddress {
  uint64_t pid = 0, descriptor = 0, inode = 0, nonce = 0, data_bytes = 0;
};

class Segment {
 public:
  // A memfd. ResourceExhausted.
  static absl::StatusOr<std::shared_ptr<Segment>> Create(size_t data_bytes, uint64_t nonce);
  // Memory of this process only.
  static absl::StatusOr<std::shared_ptr<Segment>> CreatePrivate(size_t data_bytes);
  // A peer's. Unavailable where its process is gone, FailedPrecondition where something else is
  // there.
  static absl::StatusOr<std::shared_ptr<Segment>> Attach(const SegmentAddress& address);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  SegmentControl& control() { return *control_; }
  LaneControl& lane(Lane lane) { return control_->lanes[static_cast<int>(lane)]; }
  Descriptor& descriptor(Lane lane, uint64_t sequence) {
    return control_->descriptors[static_cast<int>(lane)][sequence % SegmentControl::kDescriptors];
  }
  // Half `sequence % 2` of the lane's staging, Communicator::kSmallBytes.
  std::byte* staging(Lane lane, uint64_t sequence);
  std::byte* data() { return data_; }
  size_t data_bytes() const { return data_bytes_; }
  bool shared() const { return shared_; }  // between processes

  SegmentAddress address() const;  // of one made by Create
  // After all peers have attached.
  void CloseDescriptor();

 private:
  Segment(void* base, size_t data_bytes, bool shared, int descriptor);

  std::byte* const base_;
  SegmentControl* const control_;
  std::byte* const data_;
  const size_t data_bytes_;
  const bool shared_;
  int descriptor_;
};

}  // namespace lockstep::collective
