// The closing table of a job, and where its things lie. Thread-safe: pure functions.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "client/terminal.h"
#include "lockstep/v1/job.pb.h"

namespace lockstep::client {

// The state line and a table of what the job reached: steps, scores, speed, digests.
std::string SummaryText(const v1::Job& job, const Terminal& terminal);

// Everything `describe` shows.
std::string DescriptionText(const v1::Job& job, const Terminal& terminal);

std::string PaintState(v1::JobState state, const Terminal& terminal);

// "a titled, indented list": used for paths and for what to try next.
std::string ListText(const std::string& title,
                     const std::vector<std::pair<std::string, std::string>>& lines,
                     const Terminal& terminal);

}  // namespace lockstep::client
