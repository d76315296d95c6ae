#include "client/cli.h"

#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <sstream>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/format.h"
#include "client/interrupts.h"

namespace lockstep::client {
namespace {

void AddOutput(CLI::App* command, bool* json) {
  command
      ->add_option_function<std::string>(
          "-o,--output", [json](const std::string& format) { *json = format == "json"; },
          "Form of the result: table (default) or json")
      ->type_name("FORMAT")
      ->check(CLI::IsMember({"json", "table"}));
}

void AddCluster(CLI::App* command, ClusterOptions* options) {
  command
      ->add_option("--coordinator", options->coordinator,
                   "The coordinator's address (environment: LOCKSTEP_COORDINATOR)")
      ->type_name("HOST:PORT")
      ->envname("LOCKSTEP_COORDINATOR")
      ->default_val("127.0.0.1:7070");
  command->add_flag("--insecure", options->insecure,
                    "Accept an unencrypted connection to an address that is not loopback");
  AddOutput(command, &options->json);
}

void AddSpec(CLI::App* command, std::string* spec, std::vector<std::string>* overrides) {
  command->add_option("SPEC", *spec, "The job's spec, a YAML file")->required()->type_name("");
  command
      ->add_option("--set", *overrides,
                   "Replace one field of the spec; may be repeated (train.epochs=3, "
                   "model.layers.conv1.filters=8)")
      ->type_name("PATH=VALUE")
      ->type_size(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  // Behind --set, which assigns the list.
  command
      ->add_option_function<std::string>(
          "--device",
          [overrides](const std::string& device) {
            const std::string own = "resources.device=" + device;
            for (const std::string& other : *overrides) {
              if (other.starts_with("resources.device=") && other != own) {
                throw CLI::ValidationError("--device " + device + ", but --set " + other);
              }
            }
            overrides->push_back(own);
          },
          "What to compute on: cpu or cuda (short for --set resources.device=...)")
      ->type_name("KIND");
}

CLI::App* AddCommand(CLI::App& app, const std::string& name, const std::string& description,
                     const std::string& example) {
  CLI::App* command = app.add_subcommand(name, description);
  command->footer("Example:\n  " + example);
  return command;
}

CLI::App* AddJobCommand(CLI::App& app, const std::string& name, const std::string& description,
                        const std::string& example, std::string* job, ClusterOptions* cluster) {
  CLI::App* command = AddCommand(app, name, description, example);
  command->add_option("JOB", *job, "The job, such as mlp-1")->required()->type_name("");
  AddCluster(command, cluster);
  return command;
}

}  // namespace

int RunCli(int argc, char** argv, const std::string& version) {
  // gRPC's own log is not for users; our errors say what they need.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  Interrupts interrupts;

  CLI::App app("Lockstep: synchronous data-parallel training with the same bits on any cluster",
               "lockstep");
  app.set_version_flag("--version", "lockstep " + version);
  app.require_subcommand(1);
  app.footer(
      "`lockstep COMMAND --help` explains one command.\n\nExample:\n"
      "  lockstep run deploy/jobs/mlp.yaml");
  std::function<int()> chosen;
  ClusterOptions cluster;
  std::string job;
  bool follow = false, csv = false;

  RunOptions run;
  CLI::App* command = AddCommand(
      app, "run",
      "Train a job on this machine: starts a coordinator and workers, leaves nothing behind",
      "lockstep run deploy/jobs/mlp.yaml --set train.epochs=1 --out runs/first");
  AddSpec(command, &run.spec, &run.overrides);
  command->add_option("--workers", run.workers, "Worker processes")
      ->type_name("W")
      ->check(CLI::Range(1, 1024))
      ->default_val(1);
  command
      ->add_option(
          "--slots", run.slots,
          "Slots of each worker (default: the machine's cores, shared among the workers; of a "
          "GPU 1)")
      ->type_name("N")
      ->check(CLI::Range(1, 1024));
  command
      ->add_option("--out", run.out,
                   "Folder of the results (default: runs/NAME-TIME); an earlier run there is moved "
                   "aside")
      ->type_name("DIR");
  command->add_option("--resume", run.resume, "Go on from this run's or checkpoint's folder")
      ->type_name("DIR");
  AddOutput(command, &run.json);
  command->callback([&] { chosen = [&] { return Run(run, interrupts); }; });

  SubmitOptions submit;
  command = AddCommand(app, "submit", "Hand a job to a running coordinator",
                       "lockstep submit deploy/jobs/mlp.yaml --follow --coordinator 10.0.0.5:7070 "
                       "--insecure");
  AddSpec(command, &submit.spec, &submit.overrides);
  command->add_flag("--follow", submit.follow, "Watch the job until it has ended");
  command
      ->add_option("--out", submit.out,
                   "Folder of the results on the workers' hosts (default: the worker's own)")
      ->type_name("DIR");
  command
      ->add_option("--resume", submit.resume,
                   "Go on from this run's or checkpoint's folder on a worker's host")
      ->type_name("DIR");
  AddCluster(command, &cluster);
  command->callback([&] { chosen = [&] { return Submit(submit, cluster, interrupts); }; });

  command = AddCommand(app, "jobs", "List the coordinator's jobs", "lockstep jobs -o json");
  AddCluster(command, &cluster);
  command->callback([&] { chosen = [&] { return ListJobs(cluster, interrupts); }; });

  command = AddJobCommand(app, "describe",
                          "Show a job's state, placement, scores and where its checkpoints lie",
                          "lockstep describe mlp-1", &job, &cluster);
  command->callback([&] { chosen = [&] { return Describe(job, cluster, interrupts); }; });

  command = AddJobCommand(app, "watch", "Follow a job until it has ended", "lockstep watch mlp-1",
                          &job, &cluster);
  command->callback([&] { chosen = [&] { return Watch(job, cluster, interrupts); }; });

  command = AddJobCommand(app, "logs", "Print the job's log of every worker",
                          "lockstep logs mlp-1 --follow", &job, &cluster);
  command->add_flag("--follow", follow, "Go on until the job has ended");
  command->callback([&] { chosen = [&] { return Logs(job, follow, cluster, interrupts); }; });

  command = AddJobCommand(app, "metrics", "Print the metrics of every step and evaluation",
                          "lockstep metrics mlp-1 --csv > metrics.csv", &job, &cluster);
  command->add_flag("--csv", csv, "As comma-separated values");
  command->callback([&] { chosen = [&] { return Metrics(job, csv, cluster, interrupts); }; });

  command = AddJobCommand(app, "cancel", "End a job and free its slots", "lockstep cancel mlp-1",
                          &job, &cluster);
  command->callback([&] { chosen = [&] { return Cancel(job, cluster, interrupts); }; });

  command = AddCommand(app, "workers", "List the coordinator's workers and their free slots",
                       "lockstep workers");
  AddCluster(command, &cluster);
  command->callback([&] { chosen = [&] { return ListWorkers(cluster, interrupts); }; });

  ExplainOptions explain;
  command =
      AddCommand(app, "explain", "Show a spec's layers, shapes, memory, placement and defaults",
                 "lockstep explain deploy/jobs/fashion-cnn.yaml --slots 1,2,8");
  AddSpec(command, &explain.spec, &explain.overrides);
  command
      ->add_option("--slots", explain.slots,
                   "Numbers of slots to place the shards on (default: 1,2,4,… up to the shards)")
      ->type_name("N,N,...");
  AddOutput(command, &explain.json);
  command->callback([&] { chosen = [&] { return Explain(explain, interrupts); }; });

  EvaluateOptions evaluate;
  command = AddCommand(app, "evaluate", "Score a checkpoint on its validation data",
                       "lockstep evaluate runs/first");
  command
      ->add_option("DIR", evaluate.folder,
                   "A run's folder (its newest checkpoint) or a checkpoint's")
      ->required()
      ->type_name("");
  command->add_option("--data", evaluate.data, "Folder of the data, instead of the spec's")
      ->type_name("PATH");
  AddOutput(command, &evaluate.json);
  command->callback([&] { chosen = [&] { return Evaluate(evaluate, interrupts); }; });

  DoctorOptions doctor;
  command = AddCommand(app, "doctor",
                       "Show what this machine can compute on, what is in the way of the rest, and "
                       "what to do (exit code 1: the device cannot be used)",
                       "lockstep doctor --device cuda");
  command->add_option("--device", doctor.device, "What must be usable: cpu (default) or cuda")
      ->type_name("KIND")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  AddOutput(command, &doctor.json);
  command->callback([&] { chosen = [&] { return Doctor(doctor, interrupts); }; });

  DiffOptions diff;
  command = AddCommand(app, "diff",
                       "Compare two runs bit by bit: names the first differing step and tensors "
                       "(exit code 0: equal, 1: different, 2: cannot compare)",
                       "lockstep diff runs/first runs/second");
  command->add_option("A", diff.a, "A run's folder")->required()->type_name("");
  command->add_option("B", diff.b, "Another's")->required()->type_name("");
  AddOutput(command, &diff.json);
  command->callback([&] { chosen = [&] { return Diff(diff); }; });

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {  // help, version
      std::ostringstream text;
      app.exit(error, text, text);
      WriteAll(STDOUT_FILENO, text.str());
      return CheckOutput(kExitOk);
    }
    std::string help = "lockstep --help";
    for (const CLI::App* parsed : app.get_subcommands()) {
      help = "lockstep " + parsed->get_name() + " --help";
    }
    return Fail(
        absl::InvalidArgumentError(absl::StrCat(OneLine(error.what()), "; see `", help, "`")));
  }
  return CheckOutput(chosen());
}

}  // namespace lockstep::client
