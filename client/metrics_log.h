// The metrics of a run, in order: what `metrics` prints and <out>/metrics.csv holds.
//
// One row per step; an evaluation stands in the row of the step after which it was made, or in a
// row of its own where that step is not in the log. A repeated step or evaluation replaces the
// earlier. Not thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "client/terminal.h"
#include "lockstep/v1/job.pb.h"
#include "nlohmann/json.hpp"

namespace lockstep::client {

class MetricsLog {
 public:
  void Add(const v1::StepMetrics& step) { rows_[step.step()].step = step; }
  void Add(const v1::Evaluation& evaluation) { rows_[evaluation.step()].evaluation = evaluation; }
  bool empty() const { return rows_.empty(); }

  // step,epoch,train_loss,train_accuracy,samples,learning_rate,gradient_norm,seconds,validation_loss,
  // validation_accuracy,validation_samples,state_digest: numbers in the shortest form that reads
  // back to the same bits; empty where there is none.
  std::string Csv() const { return CsvAfter(""); }
  // The same with the rows of `earlier`, the CSV of a run that this one goes on from: those before
  // its first step. An earlier row stays where this log only has an evaluation of its step.
  std::string CsvAfter(const std::string& earlier) const;
  std::string TableText(const Terminal& terminal) const;
  // {"job":…, "steps":[…], "evaluations":[…]}, elements as on the wire.
  nlohmann::ordered_json Json(const std::string& job) const;

 private:
  struct Row {
    v1::StepMetrics step;       // step() is 0: none
    v1::Evaluation evaluation;  // has no validation: none
  };
  std::map<int64_t, Row> rows_;
};

}  // namespace lockstep::client
