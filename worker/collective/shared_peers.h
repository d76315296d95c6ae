// Flags between members that share memory: who has posted and finished which operation of a lane,
// waiting for it (spin, then futex, with a deadline), and giving up.
//
// Thread safety: as Communicator: one thread at a time per lane; GiveUp from any thread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "worker/collective/segment.h"

namespace lockstep::collective {

class SharedPeers {
 public:
  // segments[m]: of member m; null where it does not share memory with us. `spin` as SpinRounds.
  SharedPeers(int rank, std::vector<std::shared_ptr<Segment>> segments, int spin);

  Segment& own() { return *segments_[rank_]; }
  Segment& peer(int member) { return *segments_[member]; }
  bool shares(int member) const { return segments_[member] != nullptr; }
  const std::vector<int>& peers() const { return peers_; }  // that share, without ourselves

  enum class Mark { kPosted, kFinished };
  // Raises our own mark to `sequence` and wakes the peers that wait for it.
  void Raise(Lane lane, Mark mark, uint64_t sequence);
  bool Reached(Lane lane, int member, Mark mark, uint64_t sequence);

  enum class Outcome { kReached, kDeadline, kGaveUp };
  Outcome Await(Lane lane, int member, Mark mark, uint64_t sequence, absl::Time deadline);
  // All peers; on kDeadline the members missing.
  Outcome AwaitAll(Lane lane, Mark mark, uint64_t sequence, absl::Time deadline,
                   std::vector<int>* missing);

  // Tells the peers, once; `origin` is the member that was first to give up.
  void GiveUp(int origin, const std::string& reason);
  struct Cause {
    int origin = 0;
    std::string reason;
  };
  // What a peer (not ourselves) said when it gave up, if one did.
  std::optional<Cause> PeerGaveUp();

 private:
  bool AnyGaveUp();

  const int rank_;
  const std::vector<std::shared_ptr<Segment>> segments_;
  std::vector<int> peers_;
  const int spin_;
};

}  // namespace lockstep::collective
