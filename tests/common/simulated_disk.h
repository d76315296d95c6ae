// A disk in memory that can fill up, fail at any operation, and crash: then what was never synced
// may be lost, kept, torn or zeroed, each entry and file for itself. Thread-safe.
//
// A file's bytes are durable as of its last Sync, a folder's entries as of its last SyncDirectory;
// a rename within a folder is lost or kept as a whole, as journaling file systems do.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "common/fs.h"

namespace lockstep {

class SimulatedDisk : public FileSystem {
 public:
  enum class Loss { kEverythingUnsynced, kNothing, kRandom };

  // Operations that change something, so far.
  int operations() {
    absl::MutexLock lock(&mutex_);
    return operations_;
  }
  // Operation number `operation` (from 1) fails once; an Append has written half by then.
  void FailAt(int operation, absl::Status status) {
    absl::MutexLock lock(&mutex_);
    fail_at_ = operation;
    failure_ = std::move(status);
  }
  // From operation number `operation` on nothing works until Recover.
  void CrashAt(int operation) {
    absl::MutexLock lock(&mutex_);
    crash_at_ = operation;
  }
  void SetCapacity(int64_t bytes) {
    absl::MutexLock lock(&mutex_);
    capacity_ = bytes;
  }
  // The machine starts again: what the disk holds after the crash.
  void Recover(Loss loss, uint64_t seed = 0) {
    absl::MutexLock lock(&mutex_);
    random_.seed(seed);
    RecoverNode(*root_, loss);
    crash_at_ = fail_at_ = kNever;
  }
  // Replaces bytes of a file behind everyone's back.
  void Damage(const std::string& path, const std::string& content) {
    absl::MutexLock lock(&mutex_);
    const std::shared_ptr<Node> node = Find(path);
    node->live = node->durable = content;
  }

  absl::StatusOr<std::unique_ptr<WritableFile>> Create(const std::string& path) override {
    absl::MutexLock lock(&mutex_);
    if (absl::Status s = Begin("create", path); !s.ok()) return s;
    const std::shared_ptr<Node> parent = Find(ParentPath(path));
    if (parent == nullptr) return Error(ENOENT, "create", path);
    std::shared_ptr<Node> node = Find(path);
    if (node != nullptr && node->directory) return Error(EISDIR, "create", path);
    if (node == nullptr) {
      node = std::make_shared<Node>();
      Change(*parent, {"", BaseName(path), node});
    }
    node->live.clear();
    return std::make_unique<Writer>(this, node, path);
  }

  absl::StatusOr<std::unique_ptr<ReadableFile>> Open(const std::string& path) override {
    absl::MutexLock lock(&mutex_);
    const std::shared_ptr<Node> node = Find(path);
    if (node == nullptr) return Error(ENOENT, "open", path);
    if (node->directory) return absl::FailedPreconditionError(path + " is a folder");
    return std::make_unique<Reader>(node->live);
  }

  absl::Status Rename(const std::string& from, const std::string& to) override {
    absl::MutexLock lock(&mutex_);
    if (absl::Status s = Begin("rename", from); !s.ok()) return s;
    const std::shared_ptr<Node> node = Find(from), parent = Find(ParentPath(to)), old = Find(to);
    if (node == nullptr || parent == nullptr) return Error(ENOENT, "rename", from);
    if (Find(ParentPath(from)) != parent) return Error(EXDEV, "rename", from);
    if (old != nullptr && old->directory != node->directory) return Error(EEXIST, "rename", from);
    if (old != nullptr && !old->entries.empty()) return Error(ENOTEMPTY, "rename", from);
    Change(*parent, {BaseName(from), BaseName(to), node});
    return absl::OkStatus();
  }

  absl::Status SyncDirectory(const std::string& path) override {
    absl::MutexLock lock(&mutex_);
    if (absl::Status s = Begin("sync", path); !s.ok()) return s;
    const std::shared_ptr<Node> node = Find(path);
    if (node == nullptr) return Error(ENOENT, "sync", path);
    node->durable_entries = node->entries;
    node->changes.clear();
    return absl::OkStatus();
  }

  absl::Status MakeDirectory(const std::string& path) override {
    absl::MutexLock lock(&mutex_);
    if (absl::Status s = Begin("make", path); !s.ok()) return s;
    const std::shared_ptr<Node> parent = Find(ParentPath(path));
    if (parent == nullptr) return Error(ENOENT, "make", path);
    if (Find(path) != nullptr) return Error(EEXIST, "make", path);
    auto node = std::make_shared<Node>();
    node->directory = true;
    Change(*parent, {"", BaseName(path), node});
    return absl::OkStatus();
  }

  absl::Status RemoveFile(const std::string& path) override { return Remove(path, false); }
  absl::Status RemoveDirectory(const std::string& path) override { return Remove(path, true); }

  absl::StatusOr<std::vector<DirectoryEntry>> List(const std::string& path) override {
    absl::MutexLock lock(&mutex_);
    const std::shared_ptr<Node> node = Find(path);
    if (node == nullptr || !node->directory) return Error(ENOENT, "list", path);
    std::vector<DirectoryEntry> entries;
    for (const auto& [name, child] : node->entries) entries.push_back({name, child->directory});
    return entries;
  }

  bool IsDirectory(const std::string& path) override {
    absl::MutexLock lock(&mutex_);
    const std::shared_ptr<Node> node = Find(path);
    return node != nullptr && node->directory;
  }

 private:
  static constexpr int kNever = std::numeric_limits<int>::max();

  struct Node;
  using Entries = std::map<std::string, std::shared_ptr<Node>>;
  struct EntryChange {  // removes one name, then adds another; "" is none
    std::string remove, add;
    std::shared_ptr<Node> node;
  };
  struct Node {
    bool directory = false;
    std::string live, durable;
    Entries entries, durable_entries;
    std::vector<EntryChange> changes;  // since the last SyncDirectory
  };

  class Writer : public WritableFile {
   public:
    Writer(SimulatedDisk* disk, std::shared_ptr<Node> node, std::string path)
        : disk_(disk), node_(std::move(node)), path_(std::move(path)) {}
    absl::Status Append(absl::string_view bytes) override {
      absl::MutexLock lock(&disk_->mutex_);
      const absl::Status status = disk_->Begin("write", path_);
      if (!status.ok()) bytes = bytes.substr(0, bytes.size() / 2);
      if (disk_->crashed()) return status;
      if (disk_->Used(*disk_->root_) + static_cast<int64_t>(bytes.size()) > disk_->capacity_) {
        return Error(ENOSPC, "write", path_);
      }
      node_->live.append(bytes.data(), bytes.size());
      return status;
    }
    absl::Status Sync() override {
      absl::MutexLock lock(&disk_->mutex_);
      if (absl::Status s = disk_->Begin("sync", path_); !s.ok()) return s;
      node_->durable = node_->live;
      return absl::OkStatus();
    }
    absl::Status Close() override {
      absl::MutexLock lock(&disk_->mutex_);
      return disk_->Begin("close", path_);
    }

   private:
    SimulatedDisk* const disk_;
    const std::shared_ptr<Node> node_;
    const std::string path_;
  };

  class Reader : public ReadableFile {
   public:
    explicit Reader(std::string content) : content_(std::move(content)) {}
    int64_t size() const override { return static_cast<int64_t>(content_.size()); }
    absl::Status ReadAt(int64_t offset, void* to, size_t bytes) override {
      if (offset < 0 || static_cast<size_t>(offset) + bytes > content_.size()) {
        return absl::OutOfRangeError("the file ends before");
      }
      std::memcpy(to, content_.data() + offset, bytes);
      return absl::OkStatus();
    }
    absl::StatusOr<std::shared_ptr<const char>> Map() override {
      const auto owner = std::make_shared<const std::string>(content_);
      return std::shared_ptr<const char>(owner, owner->data());
    }

   private:
    const std::string content_;
  };

  static absl::Status Error(int number, const std::string& action, const std::string& path) {
    return absl::ErrnoToStatus(number, absl::StrCat("cannot ", action, " ", path));
  }
  static std::string BaseName(const std::string& path) { return path.substr(path.rfind('/') + 1); }

  bool crashed() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return operations_ >= crash_at_; }

  absl::Status Begin(const std::string& action, const std::string& path)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    ++operations_;
    if (crashed()) return absl::UnavailableError(absl::StrCat("crashed at ", action, " ", path));
    if (operations_ == fail_at_) {
      return absl::Status(failure_.code(),
                          absl::StrCat("cannot ", action, " ", path, ": ", failure_.message()));
    }
    return absl::OkStatus();
  }

  std::shared_ptr<Node> Find(const std::string& path) ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    std::shared_ptr<Node> node = root_;
    for (const std::string& name : std::vector<std::string>(absl::StrSplit(path, '/'))) {
      if (name.empty() || name == ".") continue;
      const auto found = node->entries.find(name);
      if (found == node->entries.end()) return nullptr;
      node = found->second;
    }
    return node;
  }

  static void Apply(const EntryChange& change, Entries& entries) {
    if (!change.remove.empty()) entries.erase(change.remove);
    if (!change.add.empty()) entries[change.add] = change.node;
  }
  static void Change(Node& folder, const EntryChange& change) {
    Apply(change, folder.entries);
    folder.changes.push_back(change);
  }

  absl::Status Remove(const std::string& path, bool directory) {
    absl::MutexLock lock(&mutex_);
    const std::shared_ptr<Node> node = Find(path);
    if (node == nullptr) return Error(ENOENT, "remove", path);
    if (node->directory != directory) return Error(EISDIR, "remove", path);
    if (!node->entries.empty()) return Error(ENOTEMPTY, "remove", path);
    if (absl::Status s = Begin("remove", path); !s.ok()) return s;
    Change(*Find(ParentPath(path)), {BaseName(path), "", nullptr});
    return absl::OkStatus();
  }

  int64_t Used(const Node& node) const {
    auto used = static_cast<int64_t>(node.live.size());
    for (const auto& [name, child] : node.entries) used += Used(*child);
    return used;
  }

  void RecoverNode(Node& node, Loss loss) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const EntryChange& change : node.changes) {
      if (loss == Loss::kNothing || (loss == Loss::kRandom && random_() % 2 == 0)) {
        Apply(change, node.durable_entries);
      }
    }
    node.changes.clear();
    node.entries = node.durable_entries;
    if (node.live != node.durable) {
      const uint64_t fate = loss == Loss::kRandom ? random_() % 4 : 0;
      if (loss == Loss::kNothing || fate == 1) {
        node.durable = node.live;
      } else if (fate == 2) {
        node.durable = node.live.substr(0, random_() % (node.live.size() + 1));
      } else if (fate == 3) {
        node.durable.assign(node.live.size(), '\0');
      }
      node.live = node.durable;
    }
    for (auto& [name, child] : node.entries) RecoverNode(*child, loss);
  }

  absl::Mutex mutex_;
  std::shared_ptr<Node> root_ ABSL_GUARDED_BY(mutex_) = [] {
    auto root = std::make_shared<Node>();
    root->directory = true;
    return root;
  }();
  int operations_ ABSL_GUARDED_BY(mutex_) = 0;
  int crash_at_ ABSL_GUARDED_BY(mutex_) = kNever, fail_at_ ABSL_GUARDED_BY(mutex_) = kNever;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  int64_t capacity_ ABSL_GUARDED_BY(mutex_) = std::numeric_limits<int64_t>::max();
  std::mt19937_64 random_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace lockstep
