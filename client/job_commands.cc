// The commands that talk to a running coordinator.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/follow.h"
#include "client/format.h"
#include "client/job_client.h"
#include "client/json.h"
#include "client/progress.h"
#include "client/summary.h"
#include "client/table.h"
#include "common/rpc/address.h"
#include "common/spec/spec.h"

namespace lockstep::client {
namespace {

using nlohmann::ordered_json;

constexpr Table::Align kRight = Table::Align::kRight;
// A coordinator that is restarted is waited for.
constexpr absl::Duration kPatience = absl::Seconds(15);
// `cancel` waits so long for the slots to be free; they are within 2 seconds.
constexpr absl::Duration kCancelTimeout = absl::Seconds(10);

void Print(const std::string& text) { WriteAll(STDOUT_FILENO, text); }

// A command's connection, and the signal that ends its calls.
class Session {
 public:
  // Usage errors and the warning about plaintext are printed here; `code` is set where it failed.
  static std::unique_ptr<Session> Open(const ClusterOptions& options, Interrupts& interrupts,
                                       int* code) {
    const absl::StatusOr<std::string> warning =
        rpc::CheckPlaintext(options.coordinator, options.insecure);
    if (!warning.ok()) {
      *code = Fail(absl::InvalidArgumentError(
          absl::StrCat("--coordinator: ", std::string(warning.status().message()))));
      return nullptr;
    }
    if (!warning->empty()) Warn(*warning);
    return std::make_unique<Session>(options.coordinator, interrupts);
  }
  Session(const std::string& address, Interrupts& interrupts)
      : client_(address), watch_(interrupts, [this] { client_.Stop(); }) {}

  JobClient& client() { return client_; }
  bool interrupted() const { return watch_.interrupted(); }
  // The exit code of a call that failed.
  int FailWith(const absl::Status& status) {
    if (interrupted()) return kExitInterrupted;
    return Fail(absl::IsNotFound(status)
                    ? absl::NotFoundError(absl::StrCat(std::string(status.message()),
                                                       "; `lockstep jobs` lists them"))
                    : status);
  }

 private:
  JobClient client_;
  InterruptWatch watch_;
};

// Follows a job on the screen; the code of the command.
int FollowToEnd(Session& session, const std::string& job, bool json, bool events) {
  const int fd = json ? STDERR_FILENO : STDOUT_FILENO;
  const Terminal terminal = Terminal::Of(fd);
  // With events as JSON lines there is no other progress.
  Progress progress(
      terminal,
      [fd, events](const std::string& text) {
        if (!events) WriteAll(fd, text);
      },
      RealClock());
  const absl::StatusOr<v1::Job> ended =
      FollowJob(session.client(), job, kPatience, progress, [&](const v1::JobEvent& event) {
        if (events) Print(Dump(ToJson(event)) + "\n");
      });
  progress.Finish();
  if (!ended.ok()) {
    if (session.interrupted()) {
      Fail(absl::CancelledError(absl::StrCat(job, " goes on; `lockstep watch ", job,
                                             "` follows it again, `lockstep cancel ", job,
                                             "` ends it")));
    }
    return session.FailWith(ended.status());
  }
  if (json) {
    Print(Dump(ResultJson(*ended, ended->output_dir())) + "\n");
  } else {
    Print("\n" + SummaryText(*ended, terminal));
    if (!ended->checkpoints().empty()) {
      const v1::CheckpointInfo& checkpoint = *ended->checkpoints().rbegin();
      Print(absl::StrCat("\ncheckpoint  ", checkpoint.host(), ":", checkpoint.path(), "\n"));
    }
  }
  if (ended->state() == v1::SUCCEEDED) return kExitOk;
  return Fail(
      absl::UnknownError(absl::StrCat(job, " ", StateName(ended->state()), ": ", ended->reason(),
                                      "; `lockstep logs ", job, "` shows every worker's log")));
}

std::string Progressed(const v1::Job& job) {
  if (job.total_steps() == 0) return FormatCount(job.step());
  return absl::StrCat(FormatCount(job.step()), "/", FormatCount(job.total_steps()));
}

}  // namespace

int Submit(const SubmitOptions& options, const ClusterOptions& cluster, Interrupts& interrupts) {
  const absl::StatusOr<v1::JobSpec> spec = spec::LoadFile(options.spec, options.overrides);
  if (!spec.ok()) return Fail(absl::InvalidArgumentError(std::string(spec.status().message())));
  int code = 0;
  const auto session = Session::Open(cluster, interrupts, &code);
  if (session == nullptr) return code;
  v1::SubmitJobRequest request;
  *request.mutable_spec() = *spec;
  if (!options.out.empty()) request.set_output_dir(AbsolutePath(options.out));
  if (!options.resume.empty()) request.set_resume_from(AbsolutePath(options.resume));
  request.set_request_id(absl::StrCat("submit-", getpid(), "-", absl::ToUnixMicros(absl::Now())));
  absl::StatusOr<v1::Job> job = session->client().Submit(request);
  if (absl::IsUnavailable(job.status()) || absl::IsDeadlineExceeded(job.status())) {
    // It may have been accepted just before the connection broke: the id makes asking again safe.
    job = session->client().Submit(request);
  }
  if (!job.ok()) return session->FailWith(job.status());
  if (options.follow) return FollowToEnd(*session, job->id(), cluster.json, /*events=*/false);
  if (cluster.json) {
    Print(Dump(JobJson(*job)) + "\n");
  } else {
    const Terminal terminal = Terminal::Of(STDOUT_FILENO);
    Print(absl::StrCat(job->id(), " ", PaintState(job->state(), terminal),
                       job->reason().empty() ? "" : ": ", OneLine(job->reason()),
                       "\nFollow it with: lockstep watch ", job->id(), "\n"));
  }
  return kExitOk;
}

int ListJobs(const ClusterOptions& cluster, Interrupts& interrupts) {
  int code = 0;
  const auto session = Session::Open(cluster, interrupts, &code);
  if (session == nullptr) return code;
  const absl::StatusOr<v1::ListJobsResponse> response = session->client().Jobs();
  if (!response.ok()) return session->FailWith(response.status());
  if (cluster.json) {
    ordered_json list = ordered_json::array();
    for (const v1::Job& job : response->jobs()) list.push_back(JobJson(job));
    Print(Dump(list) + "\n");
    return kExitOk;
  }
  if (response->jobs().empty()) {
    Print("no jobs yet; submit one with: lockstep submit SPEC\n");
    return kExitOk;
  }
  const Terminal terminal = Terminal::Of(STDOUT_FILENO);
  const absl::Time now = absl::Now();
  Table table({{"JOB"},
               {"NAME"},
               {"STATE"},
               {"STEP", kRight},
               {"SLOTS", kRight},
               {"LOSS", kRight},
               {"ACCURACY", kRight},
               {"CREATED"},
               {"REASON"}});
  for (const v1::Job& job : response->jobs()) {
    const v1::Score* score = nullptr;
    if (job.last_step().has_train()) score = &job.last_step().train();
    if (job.last_evaluation().has_validation()) score = &job.last_evaluation().validation();
    table.AddRow(
        {job.id(), job.spec().name(), PaintState(job.state(), terminal), Progressed(job),
         std::to_string(job.placement_size()), score == nullptr ? "" : FormatLoss(score->loss()),
         score == nullptr || !score->has_accuracy() ? "" : FormatPercent(score->accuracy()),
         FormatAge(job.created_unix_ms(), now), OneLine(job.reason())});
  }
  Print(table.Render(terminal));
  return kExitOk;
}

int Describe(const std::string& job, const ClusterOptions& cluster, Interrupts& interrupts) {
  int code = 0;
  const auto session = Session::Open(cluster, interrupts, &code);
  if (session == nullptr) return code;
  const absl::StatusOr<v1::Job> found = session->client().Get(job);
  if (!found.ok()) return session->FailWith(found.status());
  Print(cluster.json ? Dump(JobJson(*found)) + "\n"
                     : DescriptionText(*found, Terminal::Of(STDOUT_FILENO)));
  return kExitOk;
}

int Watch(const std::string& job, const ClusterOptions& cluster, Interrupts& interrupts) {
  int code = 0;
  const auto session = Session::Open(cluster, interrupts, &code);
  if (session == nullptr) return code;
  return FollowToEnd(*session, job, cluster.json, /*events=*/cluster.json);
}

int Logs(const std::string& job, bool follow, const ClusterOptions& cluster,
         Interrupts& interrupts) {
  int code = 0;
  const auto session = Session::Open(cluster, interrupts, &code);
  if (session == nullptr) return code;
  const Terminal terminal = Terminal::Of(STDOUT_FILENO);
  const absl::Status status = session->client().Logs(job, follow, [&](const v1::LogChunk& chunk) {
    std::string text;
    for (const v1::LogLine& line : chunk.lines()) {
      if (cluster.json) {
        text += Dump(ToJson(line)) + "\n";
        continue;
      }
      Color color = Color::kNone;
      if (line.severity() == "WARNING") color = Color::kYellow;
      if (line.severity() == "ERROR") color = Color::kRed;
      absl::StrAppend(&text, FormatTime(line.unix_ms()), "  ",
                      line.worker().empty() ? "coordinator" : line.worker(), "  ",
                      terminal.Paint(color, line.severity()), "  ", OneLine(line.text()), "\n");
    }
    Print(text);
  });
  return status.ok() ? kExitOk : session->FailWith(status);
}

int Metrics(const std::string& job, bool csv, const ClusterOptions& cluster,
            Interrupts& interrupts) {
  int code = 0;
  const auto session = Session::Open(cluster, interrupts, &code);
  if (session == nullptr) return code;
  MetricsLog log;
  const absl::Status status = session->client().Metrics(job, [&](const v1::MetricsChunk& chunk) {
    for (const v1::StepMetrics& step : chunk.steps()) log.Add(step);
    for (const v1::Evaluation& evaluation : chunk.evaluations()) log.Add(evaluation);
  });
  if (!status.ok()) return session->FailWith(status);
  if (csv) {
    Print(log.Csv());
  } else if (cluster.json) {
    Print(Dump(log.Json(job)) + "\n");
  } else if (log.empty()) {
    Print(job + " has no metrics yet: it has not committed a step\n");
  } else {
    Print(log.TableText(Terminal::Of(STDOUT_FILENO)));
  }
  return kExitOk;
}

int Cancel(const std::string& job, const ClusterOptions& cluster, Interrupts& interrupts) {
  int code = 0;
  const auto session = Session::Open(cluster, interrupts, &code);
  if (session == nullptr) return code;
  const absl::Time deadline = absl::Now() + kCancelTimeout;
  absl::StatusOr<v1::Job> now = session->client().Cancel(job, kCancelTimeout);
  if (!now.ok()) return session->FailWith(now.status());
  // Acknowledged; shown is the end, when its slots are free.
  while (now.ok() && !IsFinal(now->state()) && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(50));
    now = session->client().Get(job);
  }
  if (!now.ok()) return session->FailWith(now.status());
  if (cluster.json) {
    Print(Dump(JobJson(*now)) + "\n");
  } else {
    Print(absl::StrCat(job, " ", PaintState(now->state(), Terminal::Of(STDOUT_FILENO)),
                       " after step ", FormatCount(now->step()), "\n"));
  }
  return kExitOk;
}

int ListWorkers(const ClusterOptions& cluster, Interrupts& interrupts) {
  int code = 0;
  const auto session = Session::Open(cluster, interrupts, &code);
  if (session == nullptr) return code;
  const absl::StatusOr<v1::ListWorkersResponse> response = session->client().Workers();
  if (!response.ok()) return session->FailWith(response.status());
  if (cluster.json) {
    ordered_json list = ordered_json::array();
    for (const v1::WorkerInfo& worker : response->workers()) list.push_back(ToJson(worker));
    Print(Dump(list) + "\n");
    return kExitOk;
  }
  if (response->workers().empty()) {
    Print(absl::StrCat("no workers; start one with: lockstep-worker --coordinator ",
                       cluster.coordinator, " --slots cpu:2\n"));
    return kExitOk;
  }
  const Terminal terminal = Terminal::Of(STDOUT_FILENO);
  const absl::Time now = absl::Now();
  Table table({{"WORKER"},
               {"STATE"},
               {"DEVICE"},
               {"FREE SLOTS", kRight},
               {"HOST"},
               {"ADDRESS"},
               {"JOBS"},
               {"LAST SEEN"},
               {"VERSION"}});
  for (const v1::WorkerInfo& worker : response->workers()) {
    const Color color = worker.state() == "LOST"   ? Color::kRed
                        : worker.state() == "IDLE" ? Color::kGreen
                                                   : Color::kCyan;
    table.AddRow({worker.name(), terminal.Paint(color, worker.state()), FormatDevice(worker),
                  absl::StrCat(worker.free_slots(), "/", worker.slots()), worker.host(),
                  worker.address(), absl::StrJoin(worker.jobs(), " "),
                  FormatAge(worker.last_seen_unix_ms(), now), worker.version()});
  }
  Print(table.Render(terminal));
  return kExitOk;
}

}  // namespace lockstep::client
