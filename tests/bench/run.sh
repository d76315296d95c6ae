#!/usr/bin/env bash
# The benchmark: Lockstep beside PyTorch on this machine, interleaved in one run. Builds the programs, prints the
# README's tables and writes a JSON line for each figure to tests/bench/results/cpu-<UTC time>.jsonl: first the
# machine, versions and command, then {name, value, unit, peer, peer_value, ratio, fraction_of_floor}.
# The PyTorch is that of the `python3` in PATH; without one the peer's columns stay empty. Whatever does not run or
# does not end in time, ours or the peer's, fails the benchmark at its end, and --readme then changes nothing.
# About half an hour, --quick a few minutes; leave the machine alone meanwhile.
# usage: tests/bench/run.sh cpu [--quick] [--readme] [--models mlp,lenet,resnet20,lstm]
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "${1:-}" != cpu ]; then
  echo "usage: tests/bench/run.sh cpu [--quick] [--readme] [--models mlp,lenet,resnet20,lstm]" >&2
  exit 2
fi
shift
bash deploy/packages.sh test >&2
cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLOCKSTEP_TESTS=ON >&2
ninja -C build lockstep lockstep-server lockstep-worker allreduce_bench machine_bench >&2
exec python3 tests/bench/cpu.py "$@"
