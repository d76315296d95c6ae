#!/usr/bin/env bash
# The checks that need a GPU, on the programs of a bundle (deploy/bundle.sh): of the bundle that this script lies in, or
# of one that it makes first from this repository. Prints a line a check and exits with 1 where any failed; ends within
# 8 minutes. tests/gpu/checks.py says what the stages are.
# usage: tests/gpu/run.sh [--out FOLDER] [--only STAGE,...] [--skip STAGE,...]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -f "$root/BUILD" ]; then
  # Rather than after the minutes that a bundle takes.
  compgen -G '/dev/nvidia[0-9]*' >/dev/null || [ -e /dev/dxg ] || {
    echo "tests/gpu/run.sh: this machine shows no GPU of NVIDIA (no /dev/nvidia0); lockstep doctor says more" >&2
    exit 1
  }
  LOCKSTEP_DATA=${LOCKSTEP_DATA:-}
  with_data=()
  [ ! -f "$LOCKSTEP_DATA/mnist/train-images-idx3-ubyte.gz" ] || with_data=(--with-data)
  made=$(bash "$root/deploy/bundle.sh" "${with_data[@]}" | tee /dev/stderr | tail -1)  # dist/NAME.tar.zst: its size
  root=$root/${made%%.tar*}
fi
exec python3 "$root/tests/gpu/checks.py" "$@"
