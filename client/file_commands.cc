// The commands that need no coordinator: explain, evaluate, doctor, diff.
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "client/commands.h"
#include "client/diff.h"
#include "client/explanation.h"
#include "client/format.h"
#include "client/json.h"
#include "client/machine_report.h"
#include "client/process.h"
#include "client/table.h"
#include "common/fs.h"
#include "common/spec/spec.h"
#include "common/status_macros.h"
#include "fmt/format.h"

namespace lockstep::client {
namespace {

using nlohmann::ordered_json;

void Print(const std::string& text) { WriteAll(STDOUT_FILENO, text); }

// Runs one of the worker's offline modes and reads the JSON object that it writes. An error has the
// worker's own code (InvalidArgument for bad usage) and its last line.
absl::StatusOr<ordered_json> AskWorker(std::vector<std::string> arguments, const std::string& input,
                                       absl::Duration timeout, Interrupts& interrupts) {
  ASSIGN_OR_RETURN(const std::string program, ProgramPath("lockstep-worker"));
  arguments.insert(arguments.begin(), program);
  ASSIGN_OR_RETURN(const Output output, RunToEnd(arguments, input, interrupts, timeout));
  if (output.exit_code != 0) {
    std::string line = LastLine(output.err);
    line = std::string(absl::StripPrefix(line, "lockstep-worker: "));
    if (line.empty()) {
      line = absl::StrCat("lockstep-worker ended without a word (", output.end,
                          "); try again, and report it if it stays so");
    }
    return output.exit_code == kExitUsage ? absl::InvalidArgumentError(line)
                                          : absl::UnknownError(line);
  }
  const std::string last = LastLine(output.out);
  ordered_json json = ordered_json::parse(last, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::InternalError(
        "lockstep-worker answered with something that is no JSON object; use programs of one "
        "version");
  }
  return json;
}

int FailOrInterrupt(const absl::Status& status) {
  return absl::IsCancelled(status) ? kExitInterrupted : Fail(status);
}

}  // namespace

int Explain(const ExplainOptions& options, Interrupts& interrupts) {
  const absl::StatusOr<v1::JobSpec> spec = spec::LoadFile(options.spec, options.overrides);
  if (!spec.ok()) return Fail(absl::InvalidArgumentError(std::string(spec.status().message())));
  std::vector<int> slots = UsualSlotCounts(spec->train().shards());
  if (!options.slots.empty()) {
    absl::StatusOr<std::vector<int>> given = ParseNumberList(options.slots);
    if (!given.ok()) {
      return Fail(absl::InvalidArgumentError(
          absl::StrCat("--slots: ", std::string(given.status().message()))));
    }
    slots = *std::move(given);
  }
  const std::string yaml = spec::ToYaml(*spec, /*expand=*/false);
  const absl::StatusOr<ordered_json> worker =
      AskWorker({"--explain"}, yaml, absl::Minutes(1), interrupts);
  if (!worker.ok()) return FailOrInterrupt(worker.status());
  const absl::StatusOr<ordered_json> json = ExplanationJson(*spec, *worker, slots);
  if (!json.ok()) return Fail(json.status());
  Print(options.json ? Dump(*json) + "\n"
                     : ExplanationText(*json, spec::ToYaml(*spec, /*expand=*/true),
                                       Terminal::Of(STDOUT_FILENO)));
  return kExitOk;
}

int Evaluate(const EvaluateOptions& options, Interrupts& interrupts) {
  if (!RealFileSystem().IsDirectory(options.folder)) {
    return Fail(absl::InvalidArgumentError(absl::StrCat(
        options.folder, " is no folder; accepted: the folder of a run or of a checkpoint")));
  }
  std::vector<std::string> arguments = {"--evaluate", AbsolutePath(options.folder)};
  if (!options.data.empty()) {
    arguments.push_back("--data");
    arguments.push_back(options.data);
  }
  const absl::StatusOr<ordered_json> json = AskWorker(arguments, "", absl::Hours(1), interrupts);
  if (!json.ok()) return FailOrInterrupt(json.status());
  if (json->contains("notes")) {
    Warn(absl::StrCat(absl::StrJoin((*json)["notes"].get<std::vector<std::string>>(), "; "),
                      "; scoring ", json->value("checkpoint", ""), ", step ",
                      json->value("step", int64_t{0})));
  }
  if (options.json) {
    Print(Dump(*json) + "\n");
    return kExitOk;
  }
  const ordered_json validation = json->value("validation", ordered_json::object());
  const auto text = [](const ordered_json& object, const char* key) {
    return object.contains(key) && object[key].is_string() ? object[key].get<std::string>() : "-";
  };
  Table table({});
  table.AddRow({"checkpoint", ShortPath(text(*json, "checkpoint"))});
  table.AddRow({"step", FormatCount(json->value("step", int64_t{0}))});
  table.AddRow({"samples", FormatCount(validation.value("samples", int64_t{0}))});
  if (validation.contains("loss") && validation["loss"].is_number()) {
    table.AddRow({"loss", FormatLoss(validation["loss"].get<double>())});
  } else {
    table.AddRow({"loss", "nan"});
  }
  if (validation.contains("accuracy") && validation["accuracy"].is_number()) {
    table.AddRow({"accuracy", FormatPercent(validation["accuracy"].get<double>())});
  }
  table.AddRow({"parameter digest", text(*json, "parameter_digest")});
  table.AddRow({"state digest", text(*json, "state_digest")});
  Print(table.Render(Terminal::Of(STDOUT_FILENO)));
  return kExitOk;
}

int Doctor(const DoctorOptions& options, Interrupts& interrupts) {
  const absl::StatusOr<ordered_json> machine =
      AskWorker({"--probe"}, "", absl::Minutes(2), interrupts);
  if (!machine.ok()) return FailOrInterrupt(machine.status());
  if (const absl::Status status = CheckMachine(*machine); !status.ok()) return Fail(status);
  Print(options.json ? Dump(*machine) + "\n"
                     : MachineText(*machine, options.device, Terminal::Of(STDOUT_FILENO)));
  const std::string why = WhyUnusable(*machine, options.device.empty() ? "cpu" : options.device);
  return why.empty() ? kExitOk : Fail(absl::FailedPreconditionError(why));
}

int Diff(const DiffOptions& options) {
  const absl::StatusOr<RunDifference> result = CompareRuns(options.a, options.b);
  if (!result.ok()) return Fail(absl::InvalidArgumentError(std::string(result.status().message())));
  if (options.json) {
    Print(Dump(DifferenceJson(*result)) + "\n");
    return result->differ ? kExitFailed : kExitOk;
  }
  const Terminal terminal = Terminal::Of(STDOUT_FILENO);
  std::string text;
  if (result->differ) {
    text = terminal.Paint(Color::kRed, "different") +
           fmt::format(" from step {} on ({} earlier steps are equal)\n", result->step,
                       FormatCount(result->steps_compared - 1));
    Table table({{"TENSOR"}, {"A"}, {"B"}});
    for (const RunDifference::Tensor& tensor : result->tensors) {
      table.AddRow({tensor.name, tensor.a.empty() ? "absent" : tensor.a,
                    tensor.b.empty() ? "absent" : tensor.b});
    }
    if (result->tensors.empty()) table.AddRow({"(state)", result->state_a, result->state_b});
    text += table.Render(terminal, "  ");
  } else {
    text = terminal.Paint(Color::kGreen, "equal") +
           fmt::format(" over {} steps ({} to {}), every tensor\n",
                       FormatCount(result->steps_compared), result->first_step, result->last_step);
  }
  if (result->only_a + result->only_b > 0) {
    text += fmt::format("not compared: {} steps only in {}, {} only in {}\n", result->only_a,
                        options.a, result->only_b, options.b);
  }
  Print(text);
  return result->differ ? kExitFailed : kExitOk;
}

}  // namespace lockstep::client
