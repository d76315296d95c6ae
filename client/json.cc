#include "client/json.h"

#include <cmath>

#include "client/format.h"

namespace lockstep::client {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using nlohmann::ordered_json;

ordered_json Number(double value) {
  return std::isfinite(value) ? ordered_json(value) : ordered_json(nullptr);
}

// Element `index` of a repeated field, or the value of a single one (index -1).
ordered_json Value(const Message& message, const FieldDescriptor* field, int index) {
  const auto* reflection = message.GetReflection();
  const bool repeated = index >= 0;
#define LOCKSTEP_GET(Type)                                         \
  (repeated ? reflection->GetRepeated##Type(message, field, index) \
            : reflection->Get##Type(message, field))
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return LOCKSTEP_GET(Int32);
    case FieldDescriptor::CPPTYPE_INT64:
      return LOCKSTEP_GET(Int64);
    case FieldDescriptor::CPPTYPE_UINT32:
      return LOCKSTEP_GET(UInt32);
    case FieldDescriptor::CPPTYPE_UINT64:
      return LOCKSTEP_GET(UInt64);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return Number(LOCKSTEP_GET(Double));
    case FieldDescriptor::CPPTYPE_FLOAT:
      return Number(LOCKSTEP_GET(Float));
    case FieldDescriptor::CPPTYPE_BOOL:
      return LOCKSTEP_GET(Bool);
    case FieldDescriptor::CPPTYPE_STRING:
      return LOCKSTEP_GET(String);
    case FieldDescriptor::CPPTYPE_ENUM: {
      const auto* value = LOCKSTEP_GET(Enum);
      return value->number() == 0 ? "" : value->name();
    }
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(LOCKSTEP_GET(Message));
  }
#undef LOCKSTEP_GET
  return nullptr;
}

ordered_json ScoreJson(const v1::Score* score) {
  ordered_json json;
  json["loss"] = score == nullptr ? ordered_json(nullptr) : Number(score->loss());
  json["accuracy"] =
      score != nullptr && score->has_accuracy() ? Number(score->accuracy()) : ordered_json(nullptr);
  json["samples"] = score == nullptr ? 0 : score->samples();
  return json;
}

}  // namespace

ordered_json ToJson(const Message& message) {
  ordered_json json = ordered_json::object();
  const auto* descriptor = message.GetDescriptor();
  const auto* reflection = message.GetReflection();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (field->is_repeated()) {
      ordered_json list = ordered_json::array();
      for (int j = 0; j < reflection->FieldSize(message, field); ++j) {
        list.push_back(Value(message, field, j));
      }
      json[field->name()] = std::move(list);
    } else if (!field->has_presence() || reflection->HasField(message, field)) {
      json[field->name()] = Value(message, field, -1);
    }
  }
  return json;
}

ordered_json ResultJson(const v1::Job& job, const std::string& out) {
  const bool ended = job.has_result();
  const v1::JobResult& result = job.result();
  const v1::Score* train = nullptr;
  if (result.has_train()) {
    train = &result.train();
  } else if (job.last_step().has_train()) {
    train = &job.last_step().train();
  }
  const v1::Score* validation = nullptr;
  if (result.has_validation()) {
    validation = &result.validation();
  } else if (job.last_evaluation().has_validation()) {
    validation = &job.last_evaluation().validation();
  }
  ordered_json json;
  json["job"] = job.id();
  json["name"] = job.spec().name();
  json["state"] = StateName(job.state());
  json["reason"] = job.reason();
  json["steps"] = ended ? result.steps() : job.step();
  json["epochs"] = ended ? result.epochs() : std::max<int64_t>(0, job.epoch() - 1);
  json["train"] = ScoreJson(train);
  json["validation"] = ScoreJson(validation);
  json["samples_per_second"] = Number(result.samples_per_second());
  json["data_wait_share"] = Number(result.data_wait_share());
  json["seconds"] = Number(ended ? result.seconds() : job.last_step().seconds());
  json["parameter_digest"] = result.parameter_digest();
  json["state_digest"] = result.state_digest();
  json["checkpoint"] = job.checkpoints().empty() ? "" : job.checkpoints().rbegin()->path();
  json["out"] = out;
  return json;
}

ordered_json JobJson(const v1::Job& job) {
  ordered_json json;
  json["job"] = job.id();
  const ordered_json all = ToJson(job);
  for (const auto& [key, value] : all.items()) {
    if (key != "id") json[key] = value;
  }
  return json;
}

std::string Dump(const ordered_json& json) {
  return json.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

}  // namespace lockstep::client
