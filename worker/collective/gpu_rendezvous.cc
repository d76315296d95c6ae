#include "worker/collective/gpu_rendezvous.h"

#include <unistd.h>

#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/status_macros.h"
#include "worker/collective/nccl_module.h"
#include "worker/device/module/cuda_module.h"

namespace lockstep::collective {
namespace {

// What is in front of the host's bytes: this, lengths as text that ends in a space, and what they
// are the lengths of.
constexpr absl::string_view kMagic = "LKSNCCL1 ";
// NCCL makes connections of its own to every member.
constexpr absl::Duration kNcclConnectTimeout = absl::Seconds(60);

bool SharesGpu(const std::vector<MemberInfo>& members) {
  std::set<std::string> gpus;
  for (const MemberInfo& member : members) {
    if (!gpus.insert(member.gpu).second) return true;
  }
  return false;
}

std::string WithLength(absl::string_view text) { return absl::StrCat(text.size(), " ", text); }

bool TakeWithLength(absl::string_view* bytes, std::string* text) {
  const size_t space = bytes->find(' ');
  uint64_t length = 0;
  if (space == absl::string_view::npos || space > 8 ||
      !absl::SimpleAtoi(bytes->substr(0, space), &length) || length > bytes->size() - space - 1) {
    return false;
  }
  *text = std::string(bytes->substr(space + 1, length));
  bytes->remove_prefix(space + 1 + length);
  return true;
}

class GpuRendezvous : public Rendezvous {
 public:
  GpuRendezvous(const RendezvousOptions& options, const NcclModule& nccl,
                std::unique_ptr<Rendezvous> host, std::string version, const std::string& id)
      : options_(options),
        nccl_(nccl),
        host_(std::move(host)),
        version_(std::move(version)),
        bytes_(absl::StrCat(kMagic, WithLength(version_), WithLength(id), host_->bytes())) {}

  std::string bytes() const override { return bytes_; }

  absl::StatusOr<std::unique_ptr<Communicator>> Connect(const std::vector<std::string>& by_rank,
                                                        absl::Time deadline,
                                                        Aborted aborted) override {
    NcclOptions nccl;
    std::vector<std::string> host_bytes;
    for (size_t rank = 0; rank < by_rank.size(); ++rank) {
      absl::string_view bytes = by_rank[rank];
      const std::string name =
          rank < options_.members.size()
              ? absl::StrCat("member ", rank, " (", options_.members[rank].name, ")")
              : absl::StrCat("member ", rank);
      if (!absl::ConsumePrefix(&bytes, kMagic)) {
        return absl::FailedPreconditionError(
            absl::StrCat(name, " does not exchange gradients over NCCL, as this member does: ",
                         "LOCKSTEP_COLLECTIVE must be the same on all workers"));
      }
      std::string version, id;
      if (!TakeWithLength(&bytes, &version) || !TakeWithLength(&bytes, &id)) {
        return absl::InvalidArgumentError(
            absl::StrCat("the rendezvous bytes of ", name, " are damaged"));
      }
      if (version != version_) {
        return absl::FailedPreconditionError(absl::StrCat(
            name, " has NCCL ", version, ", member ", options_.rank, " (",
            options_.members[options_.rank].name, ") has ", version_,
            ": all workers of a job need the same; LOCKSTEP_CUDA_LIBS names its folder"));
      }
      if (rank == 0) nccl.unique_id = id;
      host_bytes.emplace_back(bytes);
    }
    ASSIGN_OR_RETURN(std::unique_ptr<Communicator> host,
                     host_->Connect(host_bytes, deadline, aborted));
    nccl.rank = options_.rank;
    for (const MemberInfo& member : options_.members) nccl.names.push_back(member.name);
    nccl.gpu = options_.gpu;
    nccl.memory_bytes = options_.shared_bytes;
    nccl.staging_bytes = options_.staging_bytes;
    nccl.most_abort = options_.most_abort;
    return nccl_.connect(nccl, std::move(host), absl::Now() + kNcclConnectTimeout, aborted);
  }

 private:
  const RendezvousOptions options_;
  const NcclModule& nccl_;
  const std::unique_ptr<Rendezvous> host_;
  const std::string version_, bytes_;
};

}  // namespace

bool UsesNccl(const RendezvousOptions& options) {
  if (options.members.size() < 2) return false;
  if (options.gradients == GradientPath::kAutomatic) return !SharesGpu(options.members);
  return options.gradients == GradientPath::kNccl;
}

absl::StatusOr<std::unique_ptr<Rendezvous>> OpenGpuRendezvous(const RendezvousOptions& options,
                                                              std::unique_ptr<Rendezvous> host) {
  ASSIGN_OR_RETURN(const device::CudaModule* module, device::LoadCudaModule());
  const NcclModule& nccl = *module->nccl;
  if (SharesGpu(options.members)) {
    nccl.share_gpu(absl::StrCat("lockstep-", options.rank, "-", getpid()));
  }
  ASSIGN_OR_RETURN(std::string version, nccl.version());
  std::string id;
  if (options.rank == 0) {
    ASSIGN_OR_RETURN(id, nccl.new_unique_id());
  }
  return std::make_unique<GpuRendezvous>(options, nccl, std::move(host), std::move(version), id);
}

}  // namespace lockstep::collective
