#!/usr/bin/env bash
# The checks that need a GPU, on the programs of a bundle (deploy/bundle.sh): of the bundle that this script lies in, or
# of one that it makes first from this repository. Prints a line a check and exits with 1 where any failed; ends within
# 8 minutes. tests/gpu/checks.py says what the stages are.
# usage: tests/gpu/run.sh [--out FOLDER] [--only STAGE,...] [--skip STAGE,...]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -f "$root/BUILD" ]; then
  LOCKSTEP_DATA=${LOCKSTEP_DATA:-}
  with_data=()
  [ ! -f "$LOCKSTEP_DATA/mnist/train-images-idx3-ubyte.gz" ] || with_data=(--with-data)
  bash "$root/deploy/bundle.sh" "${with_data[@]}" >&2
  root=$(ls -td "$root"/dist/*/ | head -1)
fi
exec python3 "$root/tests/gpu/checks.py" "$@"
