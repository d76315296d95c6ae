// The members on other hosts, each over one TCP connection of Gloo: sends and receives on its
// unbound buffers, which can be aborted. Gloo's own timeouts close every connection at once, so
// that peers would blame whoever noticed first; deadlines are therefore kept by a thread of ours
// that interrupts the wait (also of a receive whose broken connection Gloo forgets), and a member
// that gives up sends its reason (the first cause, with the member it came from) before it closes
// its connections.
//
// Thread safety: one thread at a time per lane; Abort from any thread. No exception leaves this
// class. After any error the object is dead. SIGPIPE is ignored by the process from Open on, unless
// it has a handler: Gloo writes to sockets that a peer may have closed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/collective/communicator.h"
#include "worker/collective/rendezvous.h"

namespace lockstep::collective {

class GlooPeers {
 public:
  // The sends and receives of one operation. Memory must stay until Await has returned OK or the
  // GlooPeers is aborted and this object destroyed.
  class Transfers {
   public:
    Transfers();
    ~Transfers();

   private:
    friend class GlooPeers;
    struct Item;
    std::vector<Item> items_;
    absl::Status status_;  // of making them
  };

  // `address`: numeric, of this host. `remote`: the members to be reached. InvalidArgument names
  // the address; Unavailable where it is not this host's.
  static absl::StatusOr<std::unique_ptr<GlooPeers>> Open(const std::string& address, int rank,
                                                         const std::vector<MemberInfo>& members,
                                                         const std::vector<int>& remote);
  ~GlooPeers();

  // Opaque bytes with which `member` connects to us.
  std::string AddressFor(int member) const;
  // addresses[m], nonces[m] of member m. Unavailable names the members that did not answer.
  absl::Status Connect(const std::vector<std::string>& addresses,
                       const std::vector<uint64_t>& nonces, absl::Time deadline, Aborted aborted);

  const std::vector<int>& peers() const;

  // A slot is used once between two members. Errors are kept in `transfers`.
  void Send(Transfers& transfers, int member, const void* data, size_t bytes, uint64_t slot);
  void Receive(Transfers& transfers, int member, void* data, size_t bytes, uint64_t slot);
  // Returns when all have completed. DeadlineExceeded and Unavailable name the members; Aborted
  // after Abort, or with what a peer said when it gave up, whose origin is then stored.
  absl::Status Await(Lane lane, Transfers& transfers, absl::Time deadline, int* origin);

  // Wakes waits, tells peers and closes. Once; later calls do nothing.
  void Abort(int origin, const std::string& reason);

 private:
  struct State;
  explicit GlooPeers(std::unique_ptr<State> state);
  absl::Status AwaitItem(Lane lane, Transfers::Item& item, absl::Time deadline, bool* late);
  void SendGoodbyes(int origin, const std::string& reason);
  void PartFromPeers();

  std::unique_ptr<State> state_;
};

}  // namespace lockstep::collective
