// `lockstep run`: local mode.
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/follow.h"
#include "client/format.h"
#include "client/job_client.h"
#include "client/json.h"
#include "client/local_cluster.h"
#include "client/progress.h"
#include "client/run_folder.h"
#include "client/summary.h"
#include "common/fs.h"
#include "common/host.h"
#include "common/spec/spec.h"
#include "common/status_macros.h"

namespace lockstep::client {
namespace {

// After Ctrl-C the job may end by itself for so long.
constexpr absl::Duration kCancelTimeout = absl::Seconds(2);
// A lost worker's job is failed by the coordinator, who knows slot and step, within 10 seconds.
constexpr absl::Duration kVerdictTimeout = absl::Seconds(12);
constexpr int64_t kMaxMetricsBytes = int64_t{1} << 30;

// Submits the job and follows it on a thread of its own, so that the main thread is free for
// signals and children.
class Follower {
 public:
  Follower(const std::string& address, v1::SubmitJobRequest request, Progress& progress)
      : client_(address),
        request_(std::move(request)),
        progress_(progress),
        done_fd_(eventfd(0, EFD_CLOEXEC)),
        thread_([this] { Work(); }) {}
  ~Follower() {
    client_.Stop();
    Join();
    close(done_fd_);
  }

  int done_fd() const { return done_fd_; }  // readable at the end
  bool done() const { return done_; }

  // Asks the coordinator to cancel the job, without waiting for it.
  void Cancel() {
    const std::string job = this->job().id();
    if (job.empty()) {
      client_.Stop();
    } else if (!canceller_.joinable()) {
      canceller_ = std::thread([this, job] { client_.Cancel(job, kCancelTimeout).IgnoreError(); });
    }
  }
  void Stop() { client_.Stop(); }
  void Join() {
    if (thread_.joinable()) thread_.join();
    if (canceller_.joinable()) canceller_.join();
  }

  // As last seen; how following ended.
  v1::Job job() const {
    absl::MutexLock lock(&mutex_);
    return job_;
  }
  absl::Status status() const {
    absl::MutexLock lock(&mutex_);
    return status_;
  }

 private:
  absl::Status Follow() {
    ASSIGN_OR_RETURN(const v1::Job submitted, client_.Submit(request_));
    Set(submitted);
    const auto on_event = [this](const v1::JobEvent& event) {
      if (event.has_job()) Set(event.job());
    };
    ASSIGN_OR_RETURN(const v1::Job ended,
                     FollowJob(client_, submitted.id(), absl::Seconds(5), progress_, on_event));
    Set(ended);
    return absl::OkStatus();
  }
  void Set(const v1::Job& job) {
    absl::MutexLock lock(&mutex_);
    job_ = job;
  }
  void Work() {
    const absl::Status status = Follow();
    {
      absl::MutexLock lock(&mutex_);
      status_ = status;
    }
    done_ = true;
    const uint64_t one = 1;
    if (write(done_fd_, &one, sizeof(one)) < 0) return;
  }

  JobClient client_;
  const v1::SubmitJobRequest request_;
  Progress& progress_;
  const int done_fd_;
  std::atomic<bool> done_{false};
  mutable absl::Mutex mutex_;
  v1::Job job_ ABSL_GUARDED_BY(mutex_);
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_, canceller_;
};

struct End {
  v1::Job job;
  bool interrupted = false;
  bool killed = false;   // a second signal: no time for goodbyes
  absl::Status failure;  // where there is no verdict of the coordinator
};

// Whether the coordinator knows that the job depends on this worker, and so will end it.
bool Depends(const v1::Job& job, const std::string& worker) {
  return std::any_of(job.placement().begin(), job.placement().end(),
                     [&](const v1::SlotPlacement& slot) {
                       // A process with several GPUs is a worker for each.
                       absl::string_view name = slot.worker();
                       return absl::ConsumePrefix(&name, worker) &&
                              (name.empty() || absl::StartsWith(name, "-gpu"));
                     });
}

// The main thread's part: signals, children, redrawing, until the job has ended.
End Supervise(LocalCluster& cluster, Follower& follower, Progress& progress, Interrupts& interrupts,
              bool interactive) {
  End end;
  absl::Time give_up = absl::InfiniteFuture();
  absl::Status verdict;  // given at `give_up`
  while (!follower.done()) {
    pollfd polled[] = {{interrupts.fd(), POLLIN, 0}, {follower.done_fd(), POLLIN, 0}};
    poll(polled, 2, interactive ? 100 : 250);
    for (int signal = interrupts.Next(); signal != 0; signal = interrupts.Next()) {
      if (signal == SIGCHLD) continue;
      if (end.interrupted) {
        end.killed = true;
        cluster.Kill();
        follower.Stop();
      } else {
        end.interrupted = true;
        give_up = absl::Now() + kCancelTimeout;
        verdict = absl::CancelledError("interrupted");
        follower.Cancel();
      }
    }
    while (!end.interrupted) {
      const std::optional<LocalCluster::Loss> loss = cluster.NextLoss();
      if (!loss.has_value()) break;
      const v1::Job job = follower.job();
      const bool placed = job.state() != v1::QUEUED && Depends(job, loss->worker);
      if (loss->worker.empty() || job.id().empty() || job.state() == v1::QUEUED) {
        give_up = absl::Now();  // nobody else will tell
        verdict = absl::UnavailableError(loss->text);
      } else if (placed && verdict.ok()) {
        give_up = absl::Now() + kVerdictTimeout;
        verdict = absl::UnavailableError(loss->text);
      } else if (!placed) {
        progress.Print("warning: " + loss->text);
      }
    }
    if (absl::Now() >= give_up) {
      end.failure = verdict;
      follower.Stop();
      give_up = absl::InfiniteFuture();
    }
    progress.Tick();
  }
  follower.Join();
  end.job = follower.job();
  if (IsFinal(end.job.state())) {
    end.failure = absl::OkStatus();
  } else if (end.failure.ok()) {
    end.failure = follower.status();
    if (absl::IsUnavailable(end.failure) || absl::IsDeadlineExceeded(end.failure)) {
      // It is our own: to start another, as the client's error advises, would not help.
      end.failure = absl::UnavailableError("the coordinator no longer answers");
    }
    // A coordinator that died is found by its connection first; its log says more.
    if (const std::optional<LocalCluster::Loss> loss = cluster.NextLoss();
        absl::IsUnavailable(end.failure) && loss.has_value()) {
      end.failure = absl::UnavailableError(loss->text);
    }
  }
  return end;
}

// Slots of each worker: given, or of a machine's cores, or as many GPUs as the spec asks for.
int SlotsOf(const RunOptions& options, const v1::JobSpec& spec) {
  if (options.slots > 0) return options.slots;
  if (spec.resources().device() != "cuda") return std::max(1, AvailableCores() / options.workers);
  const int wanted = spec.resources().has_slots() ? spec.resources().slots() : 1;
  return std::max(1, (wanted + options.workers - 1) / options.workers);
}

absl::StatusOr<v1::JobSpec> LoadSpec(const RunOptions& options) {
  ASSIGN_OR_RETURN(v1::JobSpec spec, spec::LoadFile(options.spec, options.overrides));
  const int slots_offered = options.workers * SlotsOf(options, spec);
  v1::ResourceSpec& resources = *spec.mutable_resources();
  if (!resources.has_slots()) {
    resources.set_slots(std::min(slots_offered, spec.train().shards()));
  } else if (resources.slots() > slots_offered) {
    return absl::InvalidArgumentError(absl::StrCat(
        "resources.slots is ", resources.slots(), ", but this run has ", slots_offered,
        "; accepted: at most --workers times --slots",
        spec.resources().device() == "cuda" ? "" : " (more slots than cores are allowed)"));
  }
  return spec;
}

// A run that goes on in the folder of an earlier one keeps the rows before its own.
absl::Status WriteResults(const std::string& folder, bool resumed, const v1::Job& job,
                          const JobView& view) {
  const std::string path = JoinPath(folder, "metrics.csv");
  std::string earlier;
  if (resumed && RealFileSystem().Open(path).ok()) {
    ASSIGN_OR_RETURN(earlier, ReadFile(path, kMaxMetricsBytes));
  }
  RETURN_IF_ERROR(WriteFileAtomically(path, view.metrics().CsvAfter(earlier)));
  return WriteFileAtomically(JoinPath(folder, "result.json"), Dump(ResultJson(job, folder)) + "\n");
}

// A word of a command line as a shell reads it back.
std::string Quoted(const std::string& word) {
  const bool plain = std::all_of(word.begin(), word.end(), [](char c) {
    return absl::ascii_isalnum(c) || absl::StrContains("/._-+:,=@%", c);
  });
  return plain && !word.empty()
             ? word
             : absl::StrCat("'", absl::StrReplaceAll(word, {{"'", "'\\''"}}), "'");
}

// `lockstep run` with the spec as it was run, every --set included, on as many slots.
std::string RunAgain(const RunOptions& options, const std::string& folder) {
  std::string text =
      absl::StrCat("lockstep run ", Quoted(JoinPath(ShortPath(folder), "spec.yaml")));
  if (options.workers != 1) absl::StrAppend(&text, " --workers ", options.workers);
  if (options.slots > 0) absl::StrAppend(&text, " --slots ", options.slots);
  return text;
}

std::string GoOn(const RunOptions& options, const std::string& folder) {
  return absl::StrCat(RunAgain(options, folder), " --resume ", Quoted(ShortPath(folder)));
}

std::string Closing(const RunOptions& options, const v1::Job& job, const std::string& folder,
                    const Terminal& terminal) {
  std::string text = "\n" + SummaryText(job, terminal);
  const std::string shown = ShortPath(folder);
  std::vector<std::pair<std::string, std::string>> places;
  if (!job.checkpoints().empty()) {
    places.emplace_back("checkpoint", ShortPath(job.checkpoints().rbegin()->path()));
  }
  places.emplace_back("metrics", JoinPath(shown, "metrics.csv"));
  places.emplace_back("logs", JoinPath(shown, "logs"));
  text += "\n" + ListText("Files", places, terminal);
  std::vector<std::pair<std::string, std::string>> next;
  if (!job.checkpoints().empty()) {
    next.emplace_back("lockstep evaluate " + Quoted(shown), "score the checkpoint");
    // A cosine falls to its floor over the whole run: a longer one is another from its first step.
    const bool anew = job.state() == v1::SUCCEEDED && job.spec().schedule().type() == "cosine";
    std::string resume = anew ? RunAgain(options, folder) : GoOn(options, folder);
    const v1::TrainSpec& train = job.spec().train();
    if (job.state() == v1::SUCCEEDED && train.has_epochs()) {
      absl::StrAppend(&resume, " --set train.epochs=", 2 * train.epochs());
    }
    if (job.state() == v1::SUCCEEDED && train.has_steps()) {
      absl::StrAppend(&resume, " --set train.steps=", 2 * train.steps());
    }
    next.emplace_back(resume, anew ? "twice as long, from the start" : "go on from it");
  }
  if (job.result().steps() > 0) {
    next.emplace_back(absl::StrCat(RunAgain(options, folder),
                                   " --set train.seed=", job.spec().train().seed() + 1),
                      "another seed");
  }
  if (job.state() == v1::SUCCEEDED) {
    next.emplace_back("lockstep diff " + Quoted(shown) + " OTHER_RUN",
                      "compare two runs bit by bit");
  }
  return next.empty() ? text : text + "\n" + ListText("Try next", next, terminal);
}

}  // namespace

int Run(const RunOptions& options, Interrupts& interrupts) {
  signal(SIGPIPE, SIG_IGN);  // a reader that leaves (`| head`) must not leave the cluster running
  const absl::StatusOr<v1::JobSpec> spec = LoadSpec(options);
  if (!spec.ok()) return Fail(absl::InvalidArgumentError(std::string(spec.status().message())));
  LocalClusterOptions local;
  local.workers = options.workers;
  const int slots = local.slots = SlotsOf(options, *spec);
  local.device = spec->resources().device();
  for (const auto& [name, path] : {std::pair{"lockstep-server", &local.server_program},
                                   std::pair{"lockstep-worker", &local.worker_program}}) {
    absl::StatusOr<std::string> program = ProgramPath(name);
    if (!program.ok()) return Fail(program.status());
    *path = *std::move(program);
  }
  v1::SubmitJobRequest request;
  *request.mutable_spec() = *spec;
  if (!options.resume.empty()) {
    request.set_resume_from(AbsolutePath(options.resume));
    if (!RealFileSystem().IsDirectory(request.resume_from())) {
      return Fail(absl::InvalidArgumentError(absl::StrCat(
          "--resume ", options.resume,
          " is no folder; accepted: the folder of a run or of one of its checkpoints")));
    }
  }
  absl::StatusOr<RunFolder> folder =
      RunFolder::Open(options.out, spec->name(), request.resume_from(), absl::Now());
  if (!folder.ok()) return Fail(folder.status());
  if (!folder->moved().empty()) {
    Warn(absl::StrCat("the earlier run in ", ShortPath(folder->path()), " is now in ",
                      ShortPath(folder->moved())));
  }
  // A folder that was moved away may be the one to go on from.
  request.set_output_dir(folder->path());
  request.set_request_id(absl::StrCat("run-", getpid(), "-", absl::ToUnixMicros(absl::Now())));
  local.folder = folder->path();
  const absl::Status saved = WriteFileAtomically(JoinPath(folder->path(), "spec.yaml"),
                                                 spec::ToYaml(*spec, /*expand=*/false));
  if (!saved.ok()) return Fail(saved);

  const int progress_fd = options.json ? STDERR_FILENO : STDOUT_FILENO;
  const Terminal terminal = Terminal::Of(progress_fd);
  Progress progress(
      terminal, [progress_fd](const std::string& text) { WriteAll(progress_fd, text); },
      RealClock(), /*state_patience=*/absl::Seconds(1));
  progress.Print(absl::StrCat(spec->name(), ": ", options.workers,
                              options.workers == 1 ? " worker" : " workers", " with ", slots,
                              slots == 1 ? " slot" : " slots", options.workers == 1 ? "" : " each",
                              ", results in ", ShortPath(folder->path())));

  End end;
  absl::StatusOr<std::unique_ptr<LocalCluster>> cluster = LocalCluster::Start(local, interrupts);
  if (cluster.ok()) {
    Follower follower((*cluster)->address(), request, progress);
    end = Supervise(**cluster, follower, progress, interrupts, terminal.interactive);
  } else {
    end.failure = cluster.status();
    end.interrupted = absl::IsCancelled(cluster.status());
  }
  progress.Finish();
  if (cluster.ok() && !end.killed) (*cluster)->Stop();
  const JobView view = progress.view();
  if (!IsFinal(end.job.state())) {
    const v1::JobState state = end.interrupted ? v1::CANCELLED : v1::FAILED;
    if (end.job.id().empty()) *end.job.mutable_spec() = *spec;
    if (view.job().step() > end.job.step()) {
      end.job.set_step(view.job().step());
      end.job.set_epoch(view.job().epoch());
      *end.job.mutable_last_step() = view.job().last_step();
    }
    end.job.set_state(state);
    end.job.set_reason(end.interrupted ? "interrupted" : std::string(end.failure.message()));
  }
  if (end.interrupted && end.job.state() == v1::CANCELLED) end.job.set_reason("interrupted");

  const absl::Status written = WriteResults(folder->path(), !options.resume.empty(), end.job, view);
  if (!written.ok()) Fail(written);
  if (!options.json) WriteAll(STDOUT_FILENO, Closing(options, end.job, folder->path(), terminal));
  int code = kExitOk;
  if (end.interrupted && end.job.state() != v1::SUCCEEDED) {
    code = kExitInterrupted;
    Fail(absl::CancelledError(
        end.job.checkpoints().empty()
            ? "interrupted before the first checkpoint; run it again to start over"
            : absl::StrCat("interrupted; go on with: ", GoOn(options, folder->path()))));
  } else if (absl::IsInvalidArgument(end.failure)) {
    code = Fail(end.failure);  // the coordinator found what we could not
  } else if (end.job.state() != v1::SUCCEEDED) {
    code = kExitFailed;
    // A process that ended has its log named already.
    const bool named = absl::StrContains(end.job.reason(), "; log: ");
    Fail(absl::UnknownError(absl::StrCat(
        end.job.id().empty() ? spec->name() : end.job.id(), " ", StateName(end.job.state()), ": ",
        end.job.reason(), named ? "" : "; logs are in ",
        named ? "" : ShortPath(JoinPath(folder->path(), "logs")))));
  } else if (!written.ok()) {
    code = kExitFailed;
  }
  // The very last line of standard output.
  if (options.json) WriteAll(STDOUT_FILENO, Dump(ResultJson(end.job, folder->path())) + "\n");
  return code;
}

}  // namespace lockstep::client
