#include "client/summary.h"

#include "client/format.h"
#include "client/table.h"
#include "fmt/format.h"

namespace lockstep::client {
namespace {

constexpr Table::Align kRight = Table::Align::kRight;

std::vector<std::string> ScoreRow(const std::string& title, const v1::Score& score) {
  std::vector<std::string> row = {title, "loss " + FormatLoss(score.loss())};
  if (score.has_accuracy()) row.push_back("accuracy " + FormatPercent(score.accuracy()));
  return row;
}

std::string ShardRange(int first, int last) {
  if (last <= first) return "-";
  return last - first == 1 ? std::to_string(first) : fmt::format("{}-{}", first, last - 1);
}

}  // namespace

std::string PaintState(v1::JobState state, const Terminal& terminal) {
  Color color = Color::kNone;
  if (state == v1::SUCCEEDED) color = Color::kGreen;
  if (state == v1::FAILED) color = Color::kRed;
  if (state == v1::RUNNING || state == v1::STARTING) color = Color::kCyan;
  if (state == v1::CANCELLED || state == v1::STOPPING) color = Color::kYellow;
  return terminal.Paint(color, StateName(state));
}

std::string SummaryText(const v1::Job& job, const Terminal& terminal) {
  const std::string& name = job.id().empty() ? job.spec().name() : job.id();  // not accepted yet
  std::string text = terminal.Paint(Color::kBold, name);
  text += " " + PaintState(job.state(), terminal);
  if (!job.reason().empty()) text += ": " + OneLine(job.reason());
  text += "\n";
  Table table({});
  const v1::JobResult& result = job.result();
  const bool ended = job.has_result();
  table.AddRow(
      {"epochs", FormatCount(ended ? result.epochs() : std::max<int64_t>(0, job.epoch() - 1))});
  table.AddRow({"steps", FormatCount(ended ? result.steps() : job.step())});
  if (result.has_train()) {
    table.AddRow(ScoreRow("train", result.train()));
  } else if (job.last_step().has_train()) {
    table.AddRow(ScoreRow("train", job.last_step().train()));
  }
  if (result.has_validation()) {
    table.AddRow(ScoreRow("validation", result.validation()));
  } else if (job.last_evaluation().has_validation()) {
    table.AddRow(ScoreRow("validation", job.last_evaluation().validation()));
  }
  if (ended) {
    table.AddRow(
        {"speed", FormatCount(static_cast<int64_t>(result.samples_per_second())) + " samples/s"});
    table.AddRow({"waiting for data", FormatPercent(result.data_wait_share()) + " of training"});
    table.AddRow({"time", FormatDuration(result.seconds())});
    if (!result.parameter_digest().empty()) {
      table.AddRow({"parameter digest", result.parameter_digest()});
    }
    if (!result.state_digest().empty()) table.AddRow({"state digest", result.state_digest()});
  }
  return text + table.Render(terminal, "  ");
}

std::string DescriptionText(const v1::Job& job, const Terminal& terminal) {
  std::string text = SummaryText(job, terminal);
  Table times({});
  if (job.state() == v1::STOPPING) times.AddRow({"will be", StateName(job.target())});
  if (!IsFinal(job.state()) && job.total_steps() > 0) {
    times.AddRow({"of steps", FormatCount(job.total_steps())});
  }
  times.AddRow({"created", FormatTime(job.created_unix_ms())});
  times.AddRow({"started", FormatTime(job.started_unix_ms())});
  times.AddRow({"ended", FormatTime(job.ended_unix_ms())});
  times.AddRow({"generation", std::to_string(job.generation())});
  times.AddRow({"batch", fmt::format("{} samples in {} shards", job.spec().train().batch(),
                                     job.spec().train().shards())});
  if (!job.resume_from().empty()) times.AddRow({"resumed from", job.resume_from()});
  for (const std::string& warning : job.warnings()) times.AddRow({"warning", OneLine(warning)});
  if (!job.output_dir().empty()) times.AddRow({"output", job.output_dir()});
  text += times.Render(terminal, "  ");
  if (!job.placement().empty()) {
    Table table({{"WORKER"}, {"SLOT", kRight}, {"SHARDS"}});
    for (const v1::SlotPlacement& slot : job.placement()) {
      table.AddRow({slot.worker(), std::to_string(slot.slot()),
                    ShardRange(slot.first_shard(), slot.last_shard())});
    }
    text += "\nPlacement\n" + table.Render(terminal, "  ");
  }
  if (!job.checkpoints().empty()) {
    Table table({{"STEP", kRight}, {"HOST"}, {"SIZE", kRight}, {"PATH"}, {"STATE DIGEST"}});
    for (const v1::CheckpointInfo& checkpoint : job.checkpoints()) {
      table.AddRow({FormatCount(checkpoint.step()), checkpoint.host(),
                    FormatBytes(checkpoint.bytes()), checkpoint.path(), checkpoint.state_digest()});
    }
    text += "\nCheckpoints\n" + table.Render(terminal, "  ");
  }
  return text;
}

std::string ListText(const std::string& title,
                     const std::vector<std::pair<std::string, std::string>>& lines,
                     const Terminal& terminal) {
  Table table({});
  for (const auto& [left, right] : lines) table.AddRow({left, right});
  return terminal.Paint(Color::kBold, title) + "\n" + table.Render(terminal, "  ");
}

}  // namespace lockstep::client
