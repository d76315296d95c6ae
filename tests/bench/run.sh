#!/usr/bin/env bash
# The benchmark: Lockstep beside PyTorch on this machine, interleaved in one run. Builds the programs, prints the
# README's tables and writes a JSON line for each figure to tests/bench/results/cpu-<UTC time>.jsonl: first the
# machine, versions and command, then {name, value, unit, peer, peer_value, ratio, fraction_of_floor}.
# The PyTorch is that of the `python3` in PATH; without one the peer's columns stay empty. Whatever does not run or
# does not end in time, ours or the peer's, fails the benchmark at its end, and --readme then changes nothing.
# About half an hour, --quick a few minutes; leave the machine alone meanwhile.
# usage: tests/bench/run.sh cpu [--quick] [--readme] [--models mlp,lenet,resnet20,lstm]
#
# gpu: the same on one GPU, beside PyTorch's eager, graphed and compiled steps; also from an unpacked bundle
# (deploy/bundle.sh). The head of tests/bench/gpu.py says what each row is.
# usage: tests/bench/run.sh gpu [--out FOLDER] [--models mlp,lenet,lstm,resnet20,resnet50] [--precisions fp32,tf32,bf16]
#          [--ways eager,graphed,compiled] [--seconds N] [--rounds N] [--limit SECONDS] [--together] [--early] [--trace]
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/../.."
case ${1:-} in
  cpu)
    programs=(allreduce_bench machine_bench) options=() ;;
  gpu)
    programs=(lockstep_cuda gpu_floor gpu_trace) options=(-DLOCKSTEP_CUDA=ON) ;;
  *)
    sed -n 's/^# usage: /usage: /p; s/^#          /         /p' tests/bench/run.sh >&2
    exit 2 ;;
esac
what=$1
shift
if [ ! -f BUILD ]; then  # not a bundle
  bash deploy/packages.sh test >&2
  cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLOCKSTEP_TESTS=ON "${options[@]}" >&2
  ninja -C build lockstep lockstep-server lockstep-worker "${programs[@]}" >&2
fi
root=$PWD
cd "$called_from"
exec python3 "$root/tests/bench/$what.py" "$@"
