#include "server/core/state.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace lockstep::server {
namespace {

// Rows: from; columns: to; in the order of the names. 'x': allowed.
struct Table {
  std::vector<std::string> names;
  std::vector<std::string> rows;
};

const Table kJobs = {{"UNSPECIFIED", "QUEUED", "STARTING", "RUNNING", "STOPPING", "SUCCEEDED",
                      "FAILED", "CANCELLED"},
                     {
                         "........",  // unspecified
                         "..x....x",  // QUEUED
                         "...xx...",  // STARTING
                         "....xx..",  // RUNNING
                         "......xx",  // STOPPING
                         "........",  // SUCCEEDED
                         "........",  // FAILED
                         "........",  // CANCELLED
                     }};

const Table kWorkers = {{"IDLE", "ASSIGNED", "TRAINING", "LOST"},
                        {
                            ".x.x",  // IDLE
                            "x.xx",  // ASSIGNED
                            "xx.x",  // TRAINING
                            "x...",  // LOST
                        }};

template <typename State>
void ExpectTable(const Table& table) {
  for (size_t from = 0; from < table.rows.size(); ++from) {
    for (size_t to = 0; to < table.rows.size(); ++to) {
      SCOPED_TRACE(table.names[from] + " -> " + table.names[to]);
      State state = static_cast<State>(from);
      const absl::Status status = Transition(&state, static_cast<State>(to));
      if (table.rows[from][to] == 'x') {
        EXPECT_TRUE(status.ok()) << status;
        EXPECT_EQ(state, static_cast<State>(to));
      } else {
        EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
        EXPECT_EQ(state, static_cast<State>(from));
        EXPECT_NE(std::string(status.message()).find(table.names[from]), std::string::npos);
        EXPECT_NE(std::string(status.message()).find(table.names[to]), std::string::npos);
      }
    }
  }
}

TEST(StateTest, JobsMoveAsTheTableSaysAndInNoOtherWay) { ExpectTable<v1::JobState>(kJobs); }

TEST(StateTest, WorkersMoveAsTheTableSaysAndInNoOtherWay) { ExpectTable<WorkerState>(kWorkers); }

TEST(StateTest, NothingLeavesAStateInWhichAJobHasEnded) {
  for (int state = v1::JobState_MIN; state <= v1::JobState_MAX; ++state) {
    const std::string& row = kJobs.rows[state];
    const bool leads_on = row.find('x') != std::string::npos;
    if (state == v1::JOB_STATE_UNSPECIFIED) continue;
    EXPECT_EQ(HasEnded(static_cast<v1::JobState>(state)), !leads_on) << kJobs.names[state];
  }
}

}  // namespace
}  // namespace lockstep::server
