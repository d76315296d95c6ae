#include "client/explanation.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/format.h"
#include "client/json.h"
#include "client/table.h"
#include "fmt/format.h"

namespace lockstep::client {
namespace {

using nlohmann::ordered_json;

constexpr Table::Align kRight = Table::Align::kRight;

bool IsCount(const ordered_json& object, const char* key) {
  return object.contains(key) && object[key].is_number_integer();
}

// What is said of a GPU's memory besides.
bool IsGpuMemory(const ordered_json& memory) {
  const auto all = [&](const char* key, auto is) {
    return memory.contains(key) && memory[key].is_array() &&
           std::all_of(memory[key].begin(), memory[key].end(), is);
  };
  return all("parts",
             [](const ordered_json& part) {
               return part.contains("what") && part["what"].is_string() && IsCount(part, "bytes");
             }) &&
         all("not_counted", [](const ordered_json& what) { return what.is_string(); }) &&
         memory.contains("at_least") && memory["at_least"].is_boolean();
}

bool IsExplanation(const ordered_json& worker) {
  if (!worker.is_object() || !worker.contains("layers") || !worker["layers"].is_array() ||
      !IsCount(worker, "parameters") || !IsCount(worker, "flops") || !worker.contains("memory") ||
      !IsCount(worker, "segments") || !IsCount(worker, "buckets")) {
    return false;
  }
  for (const char* key : {"parameters_bytes", "gradients_bytes", "optimizer_bytes",
                          "activations_bytes", "total_bytes"}) {
    if (!IsCount(worker["memory"], key)) return false;
  }
  if (worker["memory"].contains("parts") && !IsGpuMemory(worker["memory"])) return false;
  return std::all_of(
      worker["layers"].begin(), worker["layers"].end(), [](const ordered_json& layer) {
        return layer.contains("name") && layer["name"].is_string() && layer.contains("type") &&
               layer["type"].is_string() && layer.contains("inputs") &&
               layer["inputs"].is_array() && layer.contains("output") &&
               layer["output"].is_array() && IsCount(layer, "parameters") &&
               IsCount(layer, "flops") && IsCount(layer, "activation_bytes");
      });
}

std::string Range(int64_t first, int64_t last) {
  if (last <= first) return "none";
  return last - first == 1 ? std::to_string(first) : fmt::format("{}-{}", first, last - 1);
}

}  // namespace

int64_t ShardSamples(int64_t batch, int shards, int shard) {
  return batch / shards + (shard < batch % shards ? 1 : 0);
}

std::vector<SlotShards> Place(int64_t batch, int shards, int slots) {
  std::vector<SlotShards> placement;
  for (int64_t i = 0; i < slots; ++i) {
    // A slot beyond the shards has nothing to do.
    const int64_t used = std::min(slots, shards);
    SlotShards slot;
    slot.first_shard = static_cast<int>(std::min(i, used) * shards / used);
    slot.last_shard = static_cast<int>(std::min(i + 1, used) * shards / used);
    for (int s = slot.first_shard; s < slot.last_shard; ++s) {
      slot.samples += ShardSamples(batch, shards, s);
    }
    placement.push_back(slot);
  }
  return placement;
}

std::vector<int> UsualSlotCounts(int shards) {
  std::vector<int> counts;
  for (int64_t n = 1; n < shards; n *= 2) counts.push_back(static_cast<int>(n));
  counts.push_back(shards);
  return counts;
}

absl::StatusOr<ordered_json> ExplanationJson(const v1::JobSpec& spec, const ordered_json& worker,
                                             const std::vector<int>& slot_counts) {
  if (!IsExplanation(worker)) {
    return absl::InvalidArgumentError(
        "lockstep-worker --explain gave no explanation that this version reads; use programs of "
        "one "
        "version");
  }
  ordered_json json = worker;
  json["batch"] = spec.train().batch();
  json["shards"] = spec.train().shards();
  json["shard_samples"] = ordered_json::array();
  for (int s = 0; s < spec.train().shards(); ++s) {
    json["shard_samples"].push_back(ShardSamples(spec.train().batch(), spec.train().shards(), s));
  }
  json["placements"] = ordered_json::array();
  for (const int slots : slot_counts) {
    ordered_json placement;
    placement["slots"] = slots;
    placement["holds"] = ordered_json::array();
    for (const SlotShards& slot : Place(spec.train().batch(), spec.train().shards(), slots)) {
      placement["holds"].push_back({{"first_shard", slot.first_shard},
                                    {"last_shard", slot.last_shard},
                                    {"samples", slot.samples}});
    }
    json["placements"].push_back(std::move(placement));
  }
  json["spec"] = ToJson(spec);
  return json;
}

std::string ExplanationText(const ordered_json& json, const std::string& yaml,
                            const Terminal& terminal) {
  const auto count = [](const ordered_json& value) { return value.get<int64_t>(); };
  Table layers({{"LAYER"},
                {"TYPE"},
                {"INPUTS"},
                {"OUTPUT"},
                {"PARAMETERS", kRight},
                {"FLOPS", kRight},
                {"ACTIVATIONS", kRight}});
  for (const ordered_json& layer : json["layers"]) {
    layers.AddRow({layer["name"].get<std::string>(), layer["type"].get<std::string>(),
                   absl::StrJoin(layer["inputs"].get<std::vector<std::string>>(), ", "),
                   FormatShape(layer["output"].get<std::vector<int64_t>>()),
                   FormatCount(count(layer["parameters"])),
                   FormatScaled(static_cast<double>(count(layer["flops"]))),
                   FormatBytes(count(layer["activation_bytes"]))});
  }
  layers.AddRow({"total", "", "", "", FormatCount(count(json["parameters"])),
                 FormatScaled(static_cast<double>(count(json["flops"]))),
                 FormatBytes(count(json["memory"]["activations_bytes"]))});
  std::string text = terminal.Paint(Color::kBold, "Graph") +
                     " (output shape of one sample; FLOPs of its forward pass; activations of one "
                     "slot's memory plan)\n" +
                     layers.Render(terminal, "  ");

  const ordered_json& memory = json["memory"];
  const bool gpu = memory.contains("parts");
  Table plan({{""}, {"", kRight}});
  if (gpu) {
    for (const ordered_json& part : memory["parts"]) {
      plan.AddRow({part["what"].get<std::string>(), FormatBytes(count(part["bytes"]))});
    }
    plan.AddRow({memory["at_least"].get<bool>() ? "total, at least" : "total",
                 FormatBytes(count(memory["total_bytes"]))});
  } else {
    for (const char* part : {"parameters", "gradients", "optimizer", "activations", "total"}) {
      plan.AddRow({part, FormatBytes(count(memory[absl::StrCat(part, "_bytes")]))});
    }
  }
  std::string rows = plan.Render(terminal, "  ");
  rows.erase(0, rows.find('\n') + 1);  // the line of empty titles
  if (gpu) {
    for (const ordered_json& what : memory["not_counted"]) {
      absl::StrAppend(&rows, "  not counted: ", what.get<std::string>(), "\n");
    }
  }
  text += "\n" +
          terminal.Paint(Color::kBold,
                         gpu ? "Memory of one GPU with all shards" : "Memory of one slot") +
          fmt::format(" ({} segments, {} gradient buckets)\n", count(json["segments"]),
                      count(json["buckets"])) +
          rows;

  const std::vector<int64_t> samples = json["shard_samples"].get<std::vector<int64_t>>();
  text +=
      "\n" + terminal.Paint(Color::kBold, "Shards") +
      fmt::format(" (batch {} in {} shards: {})\n", count(json["batch"]), samples.size(),
                  samples.front() == samples.back()
                      ? fmt::format("{} samples each", samples.front())
                      : fmt::format("{} samples in the first {}, {} in the others", samples.front(),
                                    std::count(samples.begin(), samples.end(), samples.front()),
                                    samples.back()));
  Table shards({{"SLOTS", kRight}, {"SHARDS OF SLOT 0, 1, …"}, {"SAMPLES"}});
  for (const ordered_json& placement : json["placements"]) {
    constexpr size_t kShown = 8;
    std::vector<std::string> ranges, sizes;
    for (const ordered_json& slot : placement["holds"]) {
      if (ranges.size() == kShown) {
        ranges.push_back("...");
        sizes.push_back("...");
        break;
      }
      ranges.push_back(Range(count(slot["first_shard"]), count(slot["last_shard"])));
      sizes.push_back(std::to_string(count(slot["samples"])));
    }
    shards.AddRow({std::to_string(count(placement["slots"])), absl::StrJoin(ranges, ", "),
                   absl::StrJoin(sizes, ", ")});
  }
  text += shards.Render(terminal, "  ");
  return text + "\n" + terminal.Paint(Color::kBold, "Spec") + " (every default filled in)\n" + yaml;
}

}  // namespace lockstep::client
