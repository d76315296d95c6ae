#include "tests/train/members.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/fs.h"
#include "common/spec/spec.h"
#include "worker/train/member_job.h"

namespace lockstep::train {
namespace {

struct Folders {
  ~Folders() {
    for (const std::string& path : paths) RemoveTree(path).IgnoreError();
  }
  std::vector<std::string> paths;
};

}  // namespace

std::string Numbers(const Training& run) {
  std::string text;
  for (v1::StepMetrics s : run.steps) {
    s.clear_seconds();
    absl::StrAppend(&text, s.ShortDebugString(), "\n");
  }
  for (v1::Evaluation e : run.evaluations) {
    e.clear_seconds();
    absl::StrAppend(&text, e.ShortDebugString(), "\n");
  }
  return text;
}

std::string TemporaryFolder() {
  static Folders folders;
  std::string path = absl::StrCat(testing::TempDir(), "lockstep-train-XXXXXX");
  EXPECT_NE(mkdtemp(path.data()), nullptr);
  folders.paths.push_back(path);
  return path;
}

Training RunMembers(const std::string& yaml, const Cluster& cluster) {
  Training run;
  absl::StatusOr<v1::JobSpec> spec = spec::LoadText(yaml, "test.yaml", {});
  EXPECT_TRUE(spec.ok()) << spec.status();
  if (!spec.ok()) return run;
  const int shards = spec->train().shards();
  v1::Prepare prepare;
  prepare.set_job("test-1");
  prepare.set_generation(1);
  *prepare.mutable_spec() = *spec;
  prepare.set_resume_from(cluster.resume_from);
  prepare.set_output_dir(cluster.output_dir.empty() ? TemporaryFolder() : cluster.output_dir);
  const int total_slots = cluster.workers * cluster.slots;
  for (int rank = 0; rank < cluster.workers; ++rank) {
    v1::Member* member = prepare.add_members();
    member->set_worker(absl::StrCat("worker-", rank));
    member->set_host_id(cluster.host_ids.empty() ? "here" : cluster.host_ids[rank]);
    member->set_address(cluster.addresses.empty() ? "127.0.0.1" : cluster.addresses[rank]);
    for (int slot = 0; slot <= cluster.slots; ++slot) {
      member->add_bounds((rank * cluster.slots + slot) * shards / total_slots);
    }
  }
  absl::Mutex mutex;
  std::vector<std::unique_ptr<MemberJob>> members;
  v1::Start start;
  start.set_source_rank(-1);
  int64_t best_version = -1;
  for (int rank = 0; rank < cluster.workers; ++rank) {
    MemberOptions options;
    options.prepare = prepare;
    options.prepare.set_rank(rank);
    options.address = prepare.members(rank).address();
    if (cluster.resume_rank >= 0 && rank != cluster.resume_rank) {
      options.prepare.set_resume_from("/nowhere/on/this/host");
    }
    if (rank == cluster.workers - 1) options.flip_bit_at_step = cluster.flip_bit_at_step;
    options.send = [&](v1::WorkerMessage message) {
      absl::MutexLock lock(&mutex);
      if (message.has_digest()) run.digests.push_back(message.digest());
      if (!message.has_progress()) return;
      if (cluster.stop_after_evaluation && message.progress().evaluations_size() > 0) {
        for (auto& member : members) member->Stop();
      }
      for (const auto& s : message.progress().steps()) run.steps.push_back(s);
      for (const auto& e : message.progress().evaluations()) run.evaluations.push_back(e);
      for (const auto& c : message.progress().checkpoints()) run.checkpoints.push_back(c);
    };
    members.push_back(std::make_unique<MemberJob>(std::move(options)));
    absl::StatusOr<v1::Ready> ready = members.back()->Prepare();
    if (!ready.ok()) {
      run.prepare_error = std::string(ready.status().message());
      return run;
    }
    start.add_rendezvous(ready->rendezvous());
    run.offered.push_back(ready->state_version());
    run.notes.insert(run.notes.end(), ready->notes().begin(), ready->notes().end());
    if (ready->state_version() > best_version) {
      best_version = ready->state_version();
      start.set_source_rank(rank);
    }
  }
  run.ended.resize(cluster.workers);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < cluster.workers; ++rank) {
    threads.emplace_back([&, rank] {
      run.ended[rank] = members[rank]->Run(start);
      // As the coordinator does: a member that fails takes the others with it.
      if (run.ended[rank].outcome() == v1::Ended::ERRORED) {
        for (auto& member : members) member->Abort("a member failed");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return run;
}

std::string AgreedDigest(const Training& run) {
  EXPECT_EQ(run.prepare_error, "");
  EXPECT_FALSE(run.ended.empty());
  std::string digest;
  for (const v1::Ended& ended : run.ended) {
    EXPECT_EQ(ended.outcome(), v1::Ended::COMPLETED) << ended.error();
    EXPECT_EQ(ended.state_digest().size(), 32u);
    if (digest.empty()) digest = ended.state_digest();
    EXPECT_EQ(ended.state_digest(), digest);
  }
  return digest;
}

namespace {

// 1,030 samples in batches of 100: 13 + 13 + 13 + 13 + 12 + ... in full ones; the last of an epoch
// has 30 samples: 13, 13, 4 and five empty shards.
constexpr char kRest[] = R"(
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 1030, validation_samples: 1003,
       normalize: {mean: [0.286], std: [0.353]}}
train: {batch: 100, steps: 30, shards: 8, seed: 7, evaluate: {every_steps: 7}}
checkpoint: {every_steps: 13, keep: 5}
)";

}  // namespace

std::string MlpYaml(const std::string& extra) {
  return absl::StrCat(R"(
name: mlp
model:
  layers:
    - {name: flat, type: flatten}
    - {name: dense1, type: dense, units: 64}
    - {name: norm1, type: batch_norm, sync: batch}
    - {name: relu1, type: relu}
    - {name: drop1, type: dropout, rate: 0.2}
    - {name: dense2, type: dense, units: 32}
    - {name: relu2, type: relu}
    - {name: norm2, type: batch_norm, sync: batch}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.05, l2: 0.0001}
)",
                      kRest, extra);
}

std::string CnnYaml(const std::string& extra) {
  return absl::StrCat(R"(
name: cnn
model: {preset: fashion-cnn, sync: shard}
optimizer: {type: adam, learning_rate: 0.001}
schedule: {type: cosine, warmup_steps: 5}
)",
                      kRest, extra);
}

}  // namespace lockstep::train
