// What the single fields of a spec accept: ranges, choices, names, list lengths, and which fields
// belong to which type of layer, optimizer, schedule, loss, initializer and preset. The one table
// behind the YAML reader, the validator and their messages. Internal to common/spec.
// Thread-safe: constant tables and pure functions.
//
// Invariants:
//  1. Every scalar field reachable from JobSpec has a rule.
//  2. A field without presence refuses zero or "": that value means "not given" in the message.
#pragma once

#include <string>
#include <vector>

#include "absl/numeric/int128.h"
#include "common/spec/problem.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"

namespace lockstep::spec {

// What a value, or one element of a list, may be: "an integer from 1 to 4096".
std::string Accepted(const google::protobuf::FieldDescriptor& field);
// What a list may be: "a list of 3 elements, each an integer from 1 to 65536".
std::string AcceptedList(const google::protobuf::FieldDescriptor& field);

bool HasRule(const google::protobuf::FieldDescriptor& field);
bool AcceptsInteger(const google::protobuf::FieldDescriptor& field, absl::int128 value);
bool AcceptsNumber(const google::protobuf::FieldDescriptor& field, double value);  // NaN: false
bool AcceptsString(const google::protobuf::FieldDescriptor& field, const std::string& value);
bool AcceptsCount(const google::protobuf::FieldDescriptor& field, int count);
// ` (did you mean "adam"?)` where a choice is close to the value, else "".
std::string ChoiceHint(const google::protobuf::FieldDescriptor& field, const std::string& value);

// The value as messages show it; a list as "a list of 2 elements".
std::string FoundList(size_t count);
std::string FoundNumber(double value);
std::string FoundString(const std::string& value);

// Every value that the message holds against the rules, sub-messages included; also refuses fields
// that this version does not know (a spec from a newer client).
MaybeProblem CheckValues(const google::protobuf::Message& message, const std::string& path);

// Every field that is set must belong to `type`, the value of the field that selects among variants
// ("type", or "preset"). `fields` belong to it besides `always`.
MaybeProblem CheckApplicable(const google::protobuf::Message& message, const std::string& path,
                             const std::string& selector, const std::string& type,
                             const std::vector<std::string>& always,
                             const std::vector<std::string>& fields);

// Fields of a layer of that type, besides name, type and inputs.
const std::vector<std::string>& LayerFields(const std::string& type);

std::vector<std::string> FieldNames(const google::protobuf::Descriptor& message);

}  // namespace lockstep::spec
