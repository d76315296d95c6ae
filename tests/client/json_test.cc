#include "client/json.h"

#include <cmath>

#include "client/metrics_log.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

using nlohmann::ordered_json;
using ::testing::ElementsAre;

std::vector<std::string> Keys(const ordered_json& object) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : object.items()) keys.push_back(key);
  return keys;
}

v1::Job EndedJob() {
  v1::Job job;
  job.set_id("mlp-1");
  job.mutable_spec()->set_name("mlp");
  job.set_state(v1::SUCCEEDED);
  v1::JobResult& result = *job.mutable_result();
  result.set_steps(30);
  result.set_epochs(2);
  result.mutable_train()->set_loss(0.5);
  result.mutable_train()->set_accuracy(0.75);
  result.mutable_validation()->set_loss(0.25);
  result.mutable_validation()->set_accuracy(0.875);
  result.mutable_validation()->set_samples(1000);
  result.set_samples_per_second(12.5);
  result.set_data_wait_share(0.25);
  result.set_seconds(3.5);
  result.set_parameter_digest("aa");
  result.set_state_digest("bb");
  job.add_checkpoints()->set_path("/out/checkpoints/step-15");
  job.add_checkpoints()->set_path("/out/checkpoints/step-30");
  return job;
}

TEST(ResultJson, HasTheAgreedKeys) {
  const ordered_json json = ResultJson(EndedJob(), "/out");
  EXPECT_THAT(Keys(json),
              ElementsAre("job", "name", "state", "reason", "steps", "epochs", "train",
                          "validation", "samples_per_second", "data_wait_share", "seconds",
                          "parameter_digest", "state_digest", "checkpoint", "out"));
  EXPECT_EQ(json["job"], "mlp-1");
  EXPECT_EQ(json["state"], "SUCCEEDED");
  EXPECT_EQ(json["steps"], 30);
  EXPECT_EQ(json["epochs"], 2);
  EXPECT_EQ(json["train"]["accuracy"], 0.75);
  EXPECT_EQ(json["validation"]["loss"], 0.25);
  EXPECT_EQ(json["validation"]["samples"], 1000);
  EXPECT_EQ(json["samples_per_second"], 12.5);
  EXPECT_EQ(json["data_wait_share"], 0.25);
  EXPECT_EQ(json["seconds"], 3.5);
  EXPECT_EQ(json["parameter_digest"], "aa");
  EXPECT_EQ(json["state_digest"], "bb");
  EXPECT_EQ(json["checkpoint"], "/out/checkpoints/step-30");
  EXPECT_EQ(json["out"], "/out");
}

TEST(ResultJson, OfAJobWithoutResultSaysWhatIsKnown) {
  v1::Job job;
  job.set_id("mlp-2");
  job.set_state(v1::FAILED);
  job.set_reason("worker-0 died");
  job.set_step(7);
  job.set_epoch(2);
  job.mutable_last_step()->mutable_train()->set_loss(1.5);
  job.mutable_last_step()->set_seconds(2.5);
  const ordered_json json = ResultJson(job, "");
  EXPECT_EQ(json["reason"], "worker-0 died");
  EXPECT_EQ(json["steps"], 7);
  EXPECT_EQ(json["epochs"], 1);
  EXPECT_EQ(json["train"]["loss"], 1.5);
  EXPECT_TRUE(json["train"]["accuracy"].is_null());
  EXPECT_TRUE(json["validation"]["loss"].is_null());
  EXPECT_EQ(json["seconds"], 2.5);
  EXPECT_EQ(json["checkpoint"], "");
}

TEST(ResultJson, NonFiniteNumbersAreNull) {
  v1::Job job = EndedJob();
  job.mutable_result()->mutable_train()->set_loss(std::nan(""));
  EXPECT_NE(Dump(ResultJson(job, "/out")).find("\"train\":{\"loss\":null,"), std::string::npos);
}

TEST(ToJson, NumbersStayNumbersAndEnumsAreNames) {
  v1::Job job;
  job.set_id("x-1");
  job.set_state(v1::STOPPING);
  job.set_created_unix_ms(int64_t{1795491226000});
  job.mutable_spec()->mutable_train()->set_seed(18446744073709551615u);
  job.add_placement()->set_worker("w0");
  const ordered_json json = JobJson(job);
  EXPECT_EQ(json["job"], "x-1");
  EXPECT_FALSE(json.contains("id"));
  EXPECT_EQ(json["state"], "STOPPING");
  EXPECT_EQ(json["target"], "");
  EXPECT_EQ(json["created_unix_ms"].get<int64_t>(), 1795491226000);
  EXPECT_EQ(json["spec"]["train"]["seed"].get<uint64_t>(), 18446744073709551615u);
  EXPECT_EQ(json["placement"][0]["worker"], "w0");
  EXPECT_EQ(json["placement"][0]["slot"], 0);              // a plain zero is shown
  EXPECT_FALSE(json.contains("last_step"));                // a message that is not set is not
  EXPECT_FALSE(json["spec"]["train"].contains("epochs"));  // nor an optional number
  EXPECT_TRUE(json["checkpoints"].is_array());
}

TEST(Dump, OneLineWhateverTheBytes) {
  ordered_json json;
  json["reason"] = "bad \xff byte\nline";
  const std::string text = Dump(json);
  EXPECT_EQ(text.find('\n'), std::string::npos);
  EXPECT_TRUE(ordered_json::accept(text));
}

MetricsLog TwoStepsAndEvaluations() {
  MetricsLog log;
  for (const int64_t number : {2, 1}) {
    v1::StepMetrics step;
    step.set_step(number);
    step.set_epoch(1);
    step.mutable_train()->set_loss(0.1 * static_cast<double>(number));
    step.mutable_train()->set_samples(64);
    if (number == 1) step.mutable_train()->set_accuracy(0.5);
    step.set_learning_rate(0.05);
    step.set_gradient_norm(1.5);
    step.set_seconds(0.25);
    step.set_state_digest(number == 1 ? "d1" : "");
    log.Add(step);
  }
  for (const int64_t number : {0, 2}) {
    v1::Evaluation evaluation;
    evaluation.set_step(number);
    evaluation.set_epoch(number / 2);
    evaluation.mutable_validation()->set_loss(2.5);
    evaluation.mutable_validation()->set_accuracy(0.125);
    evaluation.mutable_validation()->set_samples(1000);
    log.Add(evaluation);
  }
  return log;
}

TEST(MetricsLog, CsvHasOneRowPerStepAndEveryBit) {
  EXPECT_EQ(TwoStepsAndEvaluations().Csv(),
            "step,epoch,train_loss,train_accuracy,samples,learning_rate,gradient_norm,seconds,"
            "validation_loss,validation_accuracy,validation_samples,state_digest\n"
            "0,0,,,,,,,2.5,0.125,1000,\n"
            "1,1,0.1,0.5,64,0.05,1.5,0.25,,,,d1\n"
            "2,1,0.2,,64,0.05,1.5,0.25,2.5,0.125,1000,\n");
}

TEST(MetricsLog, CsvAfterAnEarlierRunKeepsTheRowsBeforeItsOwn) {
  const auto log = [](int64_t first, int64_t last, double loss) {
    MetricsLog made;
    for (int64_t number = first; number <= last; ++number) {
      v1::StepMetrics step;
      step.set_step(number);
      step.mutable_train()->set_loss(loss);
      made.Add(step);
    }
    return made;
  };
  const std::string earlier = log(1, 9, 1).Csv();
  const std::string undisturbed = log(1, 5, 1).Csv();
  const std::string own = log(6, 8, 2).Csv();
  EXPECT_EQ(log(6, 8, 2).CsvAfter(earlier), undisturbed + own.substr(own.find('\n') + 1));
  EXPECT_EQ(log(6, 8, 2).CsvAfter("no such file"), own);
  EXPECT_EQ(MetricsLog().CsvAfter(earlier), earlier);
  // Of a version that had fewer columns.
  EXPECT_THAT(log(6, 6, 2).CsvAfter("step,epoch,train_loss,state_digest\n5,1,0.5,d5\n"),
              ::testing::HasSubstr("\n5,1,0.5,,,,,,,,,d5\n6,"));
  // A run that was resumed at its end only evaluates.
  MetricsLog evaluated;
  v1::Evaluation evaluation;
  evaluation.set_step(9);
  evaluation.mutable_validation()->set_loss(3);
  evaluated.Add(evaluation);
  EXPECT_EQ(evaluated.CsvAfter(earlier), earlier);
}

TEST(MetricsLog, CsvNumbersReadBackToTheSameBits) {
  MetricsLog log;
  v1::StepMetrics step;
  step.set_step(1);
  step.mutable_train()->set_loss(1.0 / 3);
  log.Add(step);
  const std::string csv = log.Csv();
  const size_t row = csv.find("\n1,0,") + 5;
  EXPECT_EQ(std::stod(csv.substr(row)), 1.0 / 3);
}

TEST(MetricsLog, ARepeatedStepReplacesTheEarlier) {
  MetricsLog log = TwoStepsAndEvaluations();
  v1::StepMetrics step;
  step.set_step(1);
  step.mutable_train()->set_loss(9);
  log.Add(step);
  EXPECT_EQ(log.Json("j")["steps"].size(), 2u);
  EXPECT_EQ(log.Json("j")["steps"][0]["train"]["loss"], 9);
}

TEST(MetricsLog, JsonAndTable) {
  const MetricsLog log = TwoStepsAndEvaluations();
  const ordered_json json = log.Json("mlp-1");
  EXPECT_EQ(json["job"], "mlp-1");
  EXPECT_EQ(json["steps"].size(), 2u);
  EXPECT_EQ(json["evaluations"].size(), 2u);
  EXPECT_EQ(json["steps"][1]["step"], 2);
  const std::string table = log.TableText(Terminal());
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 4);
  EXPECT_NE(table.find("12.50%"), std::string::npos);
  EXPECT_TRUE(MetricsLog().empty());
}

}  // namespace
}  // namespace lockstep::client
