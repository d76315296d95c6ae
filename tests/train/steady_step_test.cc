// A step after the first ones allocates nothing and takes no lock, in code of ours: the slots'
// threads do as much of both in 24 steps as in 12. Operator new and absl::Mutex are counted
// where this binary, which holds all of our code, calls them; what libraries do among themselves is
// told apart, and printed. Not in sanitizer builds, which have their own of both.
#include <gtest/gtest.h>

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "absl/base/config.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "tests/train/members.h"

namespace {

struct Counts {
  std::atomic<int64_t> allocations{0}, locks{0}, of_libraries{0};
};
std::atomic<bool> counting{false};
Counts counts;

bool IsSlot() {
  char name[16] = {};
  pthread_getname_np(pthread_self(), name, sizeof(name));
  return std::strncmp(name, "slot ", 5) == 0;
}

bool IsOurs(void* caller) {
  Dl_info here, there;
  dladdr(reinterpret_cast<void*>(&IsSlot), &here);
  return dladdr(caller, &there) != 0 && here.dli_fbase == there.dli_fbase;
}

void Count(std::atomic<int64_t>& ours, void* caller) {
  if (!counting.load(std::memory_order_relaxed) || !IsSlot()) return;
  ++(IsOurs(caller) ? ours : counts.of_libraries);
}

void* Allocate(size_t size, size_t alignment, void* caller) {
  Count(counts.allocations, caller);
  void* memory = alignment == 0 ? std::malloc(size)
                                : std::aligned_alloc(
                                      alignment, (size + alignment - 1) / alignment * alignment);
  if (memory == nullptr) std::abort();
  return memory;
}

}  // namespace

void* operator new(size_t size) { return Allocate(size, 0, __builtin_return_address(0)); }
void* operator new[](size_t size) { return Allocate(size, 0, __builtin_return_address(0)); }
void* operator new(size_t size, std::align_val_t alignment) {
  return Allocate(size, static_cast<size_t>(alignment), __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

// Comes before the shared library's, which it calls.
namespace absl {
ABSL_NAMESPACE_BEGIN
void Mutex::Lock() {
  static void (*const real)(Mutex*) = [] {
    void (Mutex::*const lock)() = &Mutex::Lock;
    void* address;
    std::memcpy(&address, &lock, sizeof(address));
    Dl_info info;
    dladdr(address, &info);
    return reinterpret_cast<void (*)(Mutex*)>(dlsym(RTLD_NEXT, info.dli_sname));
  }();
  Count(counts.locks, __builtin_return_address(0));
  real(this);
}
ABSL_NAMESPACE_END
}  // namespace absl

namespace lockstep::train {
namespace {

struct Figures {
  int64_t allocations = 0, locks = 0, of_libraries = 0;
};

Figures Measure(const std::string& model, const std::string& precision, Cluster cluster,
                int steps) {
  // One epoch has all steps; digests, evaluation and checkpoints come at the end only.
  const std::string yaml = absl::StrCat(
      "data: {path: /usr/share/datasets/fashion-mnist, train_samples: 1000, "
      "validation_samples: 40}\nmodel: ",
      model,
      "\noptimizer: {type: momentum, learning_rate: 0.01, clip_norm: 5}\ntrain: {batch: 24, "
      "steps: ",
      steps, ", shards: 8, precision: ", precision,
      ", digest_every: 0, evaluate: {every_epochs: 0}}\ncheckpoint: {every_epochs: 0}\n");
  counts.allocations = counts.locks = counts.of_libraries = 0;
  counting = true;
  const Training run = RunMembers(yaml, cluster);
  counting = false;
  AgreedDigest(run);
  EXPECT_EQ(run.steps.size(), static_cast<size_t>(steps));
  return {counts.allocations, counts.locks, counts.of_libraries};
}

TEST(SteadyStep, AllocatesNothingAndTakesNoLock) {
  const char* const models[] = {"{preset: mlp, hidden: [520, 30], dropout: 0.2, sync: batch}",
                                "{preset: lenet, sync: shard}", "{preset: resnet-20, sync: batch}",
                                "{preset: lstm-classifier, lstm_hidden: 20}"};
  for (const char* model : models) {
    for (const char* precision : {"fp32", "bf16"}) {
      for (const Cluster& cluster :
           {Cluster{.workers = 1, .slots = 2}, Cluster{.workers = 2, .slots = 1}}) {
        SCOPED_TRACE(absl::StrCat(model, " ", precision, " ", cluster.workers, "x", cluster.slots));
        const Figures few = Measure(model, precision, cluster, 12);
        const Figures many = Measure(model, precision, cluster, 24);
        EXPECT_GT(few.allocations, 0) << "before the first step";
        EXPECT_GT(few.locks, 0) << "before the first step";
        // Less than one a step: a container may have had to grow once more.
        EXPECT_LT(many.allocations, few.allocations + 12);
        EXPECT_LT(many.locks, few.locks + 12);
        std::cout << model << " " << precision << " " << cluster.workers << "x" << cluster.slots
                  << ": allocations of libraries a step: "
                  << static_cast<double>(many.of_libraries - few.of_libraries) / 12 << "\n";
      }
    }
  }
}

}  // namespace
}  // namespace lockstep::train

#endif
