#include "worker/collective/rendezvous.h"

#include <string.h>
#include <sys/random.h>

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/stable_hash.h"
#include "common/status_macros.h"
#include "worker/collective/futex.h"
#include "worker/collective/gloo_peers.h"
#include "worker/collective/gpu_rendezvous.h"
#include "worker/collective/mesh_communicator.h"
#include "worker/collective/segment.h"

namespace lockstep::collective {
namespace {

constexpr uint64_t kMagic = 0x315A564452534B4Cull;  // "LKSRDVZ1"
constexpr size_t kMaxGlooAddress = 512;

uint64_t FreshNonce() {
  uint64_t nonce = 0;
  if (getrandom(&nonce, sizeof(nonce), 0) != sizeof(nonce)) {
    std::random_device device;
    nonce = (uint64_t{device()} << 32) | device();
  }
  return nonce | 1;  // never that of zeroed memory
}

uint64_t HashOf(const std::vector<MemberInfo>& members) {
  std::string all;
  for (const MemberInfo& member : members) {
    absl::StrAppend(&all, member.name.size(), ":", member.name, member.host_id.size(), ":",
                    member.host_id);
  }
  return StableHash(all);
}

// What a member announces. On the wire: fixed-width words in the host's byte order (members have
// the same kind of device), then the addresses, then a hash of everything before.
struct Announcement {
  uint64_t rank = 0, members_hash = 0, nonce = 0, slots = 0;
  SegmentAddress segment;              // pid 0: no member shares our host
  std::vector<std::string> addresses;  // for each member; empty where it needs none
};

std::string Encode(const Announcement& a) {
  std::string bytes;
  const auto word = [&bytes](uint64_t value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  for (const uint64_t value :
       {kMagic, a.rank, a.members_hash, a.nonce, a.slots, a.segment.pid, a.segment.descriptor,
        a.segment.inode, a.segment.nonce, a.segment.data_bytes, uint64_t{a.addresses.size()}}) {
    word(value);
  }
  for (const std::string& address : a.addresses) {
    word(address.size());
    bytes += address;
  }
  word(StableHash(bytes));
  return bytes;
}

bool Decode(const std::string& bytes, size_t members, Announcement* a) {
  if (bytes.size() < 2 * sizeof(uint64_t)) return false;
  size_t at = 0;
  const size_t end = bytes.size() - sizeof(uint64_t);
  const auto word = [&](uint64_t* value) {
    if (end - at < sizeof(*value)) return false;
    memcpy(value, bytes.data() + at, sizeof(*value));
    at += sizeof(*value);
    return true;
  };
  uint64_t hash = 0;
  memcpy(&hash, bytes.data() + end, sizeof(hash));
  if (hash != StableHash(bytes.substr(0, end))) return false;
  uint64_t magic = 0, count = 0;
  for (uint64_t* value : {&magic, &a->rank, &a->members_hash, &a->nonce, &a->slots, &a->segment.pid,
                          &a->segment.descriptor, &a->segment.inode, &a->segment.nonce,
                          &a->segment.data_bytes, &count}) {
    if (!word(value)) return false;
  }
  if (magic != kMagic || count != members) return false;
  for (size_t i = 0; i < members; ++i) {
    uint64_t length = 0;
    if (!word(&length) || length > kMaxGlooAddress || length > end - at) return false;
    a->addresses.push_back(bytes.substr(at, length));
    at += length;
  }
  return at == end;
}

constexpr absl::Duration kPoll = absl::Milliseconds(50);  // of what may have been aborted

class MeshRendezvous : public Rendezvous {
 public:
  static absl::StatusOr<std::unique_ptr<Rendezvous>> Open(const RendezvousOptions& options) {
    const int size = static_cast<int>(options.members.size());
    if (options.rank < 0 || options.rank >= size || options.slots < 1) {
      return absl::InvalidArgumentError(absl::StrCat("rank ", options.rank, " of ", size,
                                                     " members with ", options.slots, " slots"));
    }
    std::unique_ptr<MeshRendezvous> rendezvous(new MeshRendezvous(options));
    std::vector<int> remote;
    bool shares = false;
    for (int member = 0; member < size; ++member) {
      if (member == options.rank) continue;
      if (rendezvous->SameHost(member)) {
        shares = true;
      } else {
        remote.push_back(member);
      }
    }
    Announcement& own = rendezvous->own_;
    own.rank = options.rank;
    own.members_hash = HashOf(options.members);
    own.nonce = FreshNonce();
    own.slots = options.slots;
    own.addresses.resize(size);
    if (shares) {
      ASSIGN_OR_RETURN(rendezvous->segment_, Segment::Create(options.shared_bytes, own.nonce));
      own.segment = rendezvous->segment_->address();
    } else {
      ASSIGN_OR_RETURN(rendezvous->segment_, Segment::CreatePrivate(options.shared_bytes));
    }
    if (!remote.empty()) {
      ASSIGN_OR_RETURN(rendezvous->gloo_,
                       GlooPeers::Open(options.address, options.rank, options.members, remote));
      for (const int member : remote) {
        own.addresses[member] = rendezvous->gloo_->AddressFor(member);
      }
    }
    rendezvous->bytes_ = Encode(own);
    return rendezvous;
  }

  std::string bytes() const override { return bytes_; }

  absl::StatusOr<std::unique_ptr<Communicator>> Connect(const std::vector<std::string>& by_rank,
                                                        absl::Time deadline,
                                                        Aborted aborted) override {
    if (segment_ == nullptr) {
      return absl::FailedPreconditionError("a rendezvous connects once; open another one");
    }
    std::vector<Announcement> announcements;
    RETURN_IF_ERROR(Check(by_rank, &announcements));
    std::shared_ptr<Segment> own = std::move(segment_);
    std::unique_ptr<GlooPeers> gloo = std::move(gloo_);
    const int size = static_cast<int>(options_.members.size());
    std::vector<std::shared_ptr<Segment>> segments(size);
    std::vector<std::string> addresses(size);
    std::vector<uint64_t> nonces(size);
    uint64_t threads = own_.slots;
    for (int member = 0; member < size; ++member) {
      nonces[member] = announcements[member].nonce;
      addresses[member] = announcements[member].addresses[options_.rank];
      if (member == options_.rank) {
        segments[member] = own;
      } else if (SameHost(member)) {
        auto attached = Segment::Attach(announcements[member].segment);
        if (!attached.ok()) {
          return absl::Status(attached.status().code(),
                              absl::StrCat("cannot share memory with ", Name(member), ": ",
                                           attached.status().message()));
        }
        segments[member] = *std::move(attached);
        threads += announcements[member].slots;
      }
    }
    RETURN_IF_ERROR(JoinShared(segments, deadline, aborted));
    own->CloseDescriptor();
    if (gloo != nullptr) RETURN_IF_ERROR(gloo->Connect(addresses, nonces, deadline, aborted));
    return std::make_unique<MeshCommunicator>(options_.rank, options_.members, std::move(segments),
                                              SpinRounds(static_cast<int>(threads)),
                                              std::move(gloo));
  }

 private:
  explicit MeshRendezvous(const RendezvousOptions& options) : options_(options) {}

  bool SameHost(int member) const {
    return options_.members[member].host_id == options_.members[options_.rank].host_id;
  }
  std::string Name(int member) const {
    return absl::StrCat("member ", member, " (", options_.members[member].name, ")");
  }

  absl::Status Check(const std::vector<std::string>& by_rank,
                     std::vector<Announcement>* announcements) const {
    const size_t size = options_.members.size();
    if (by_rank.size() != size) {
      return absl::InvalidArgumentError(
          absl::StrCat("rendezvous bytes of ", by_rank.size(), " members, expected ", size));
    }
    if (by_rank[options_.rank] != bytes_) {
      return absl::FailedPreconditionError(
          absl::StrCat("the rendezvous bytes of ", Name(options_.rank),
                       " are not those that it announced: they are of another rendezvous"));
    }
    announcements->resize(size);
    for (size_t member = 0; member < size; ++member) {
      Announcement& a = (*announcements)[member];
      const std::string name = Name(static_cast<int>(member));
      if (!Decode(by_rank[member], size, &a)) {
        return absl::InvalidArgumentError(
            absl::StrCat("the rendezvous bytes of ", name, " are damaged"));
      }
      const bool shared = a.segment.pid != 0;
      const bool shares =
          static_cast<int>(member) != options_.rank && SameHost(static_cast<int>(member));
      const bool reachable = static_cast<int>(member) == options_.rank || shares ||
                             !a.addresses[options_.rank].empty();
      if (a.rank != member || a.members_hash != own_.members_hash || (shares && !shared) ||
          !reachable || a.slots < 1 || a.slots > (1u << 20)) {
        return absl::FailedPreconditionError(
            absl::StrCat("the rendezvous bytes of ", name, " are of another rendezvous"));
      }
      if (shares && a.segment.data_bytes != own_.segment.data_bytes) {
        return absl::FailedPreconditionError(
            absl::StrCat(name, " shares ", a.segment.data_bytes, " bytes, this member ",
                         own_.segment.data_bytes, ": they must be equal"));
      }
    }
    return absl::OkStatus();
  }

  // Until all peers of our host have attached to everybody.
  absl::Status JoinShared(const std::vector<std::shared_ptr<Segment>>& segments,
                          absl::Time deadline, Aborted aborted) const {
    std::atomic<uint32_t>& joined = segments[options_.rank]->control().joined;
    joined.store(1);
    FutexWakeAll(joined, /*shared=*/true);
    std::string missing;
    for (size_t member = 0; member < segments.size(); ++member) {
      if (segments[member] == nullptr) continue;
      std::atomic<uint32_t>& word = segments[member]->control().joined;
      while (word.load() == 0 && absl::Now() < deadline) {
        RETURN_IF_ERROR(aborted());
        FutexWait(word, 0, std::min(deadline, absl::Now() + kPoll), /*shared=*/true);
      }
      if (word.load() != 0) continue;
      absl::StrAppend(&missing, missing.empty() ? "" : ", ", Name(static_cast<int>(member)));
    }
    if (missing.empty()) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("no answer from ", missing, " at the rendezvous"));
  }

  const RendezvousOptions options_;
  Announcement own_;
  std::string bytes_;
  std::shared_ptr<Segment> segment_;
  std::unique_ptr<GlooPeers> gloo_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Rendezvous>> OpenRendezvous(const RendezvousOptions& options) {
  if (options.members.empty() || options.members[0].gpu.empty() || !UsesNccl(options)) {
    return MeshRendezvous::Open(options);
  }
  RendezvousOptions small = options;
  small.shared_bytes = 0;  // gradients stay on the GPUs
  ASSIGN_OR_RETURN(std::unique_ptr<Rendezvous> host, MeshRendezvous::Open(small));
  return OpenGpuRendezvous(options, std::move(host));
}

std::vector<std::unique_ptr<Communicator>> MakeLocalCommunicators(int size, size_t shared_bytes) {
  std::vector<MemberInfo> members(size);
  std::vector<std::shared_ptr<Segment>> segments;
  for (int rank = 0; rank < size; ++rank) {
    members[rank].name = absl::StrCat("thread ", rank);
    auto segment = Segment::CreatePrivate(shared_bytes);
    if (!segment.ok()) return {};
    segments.push_back(*std::move(segment));
  }
  std::vector<std::unique_ptr<Communicator>> communicators;
  for (int rank = 0; rank < size; ++rank) {
    communicators.push_back(std::make_unique<MeshCommunicator>(
        rank, members, segments, size > 1 ? SpinRounds(size) : 0, nullptr));
  }
  return communicators;
}

}  // namespace lockstep::collective
