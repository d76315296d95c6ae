#!/usr/bin/env bash
# The checks that need other builds: formatting, clang's thread-safety analysis, ASan+UBSan and TSan.
# usage: tests/checks.sh [format] [thread-safety] [asan] [tsan]   (default: all)
set -euo pipefail
cd "$(dirname "$0")/.."
bash deploy/packages.sh test
jobs=$(nproc)
selected=("$@")
[ ${#selected[@]} -gt 0 ] || selected=(format thread-safety asan tsan)

# sanitized NAME SANITIZERS EXCEPT FOLDER...: builds and runs the tests of these folders with sanitizers, but not
# those whose names match EXCEPT.
sanitized() {
  local name=$1 sanitizers=$2 except=$3 targets=() pattern=()
  shift 3
  for folder in "$@"; do targets+=("${folder}_test"); pattern+=("^$folder/"); done
  cmake -S . -B "build-$name" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLOCKSTEP_SANITIZE="$sanitizers" >/dev/null
  ninja -C "build-$name" "${targets[@]}"
  (IFS='|'; ctest --test-dir "build-$name" --output-on-failure -j "$jobs" --no-tests=error -R "${pattern[*]}" -E "$except")
}

for check in "${selected[@]}"; do
  echo "== $check"
  case $check in
    format)
      git ls-files '*.cc' '*.h' '*.cu' | xargs clang-format --dry-run -Werror ;;
    thread-safety)
      # From the compile commands of build/, which tests/run.sh made.
      python3 - build/compile_commands.json "$jobs" <<'PYTHON'
import json, shlex, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
def ours(c):  # and neither nvcc's nor the emulator's
    other = c["file"].endswith(".cu") or "/emulator/include" in c["command"]
    return not other and not c["file"].startswith(c["directory"]) and "/tests/" not in c["file"]
commands = [c for c in json.load(open(sys.argv[1])) if ours(c)]
def check(c):
    words = shlex.split(c["command"])
    while "g++" not in words[0] and "c++" not in words[0]: words = words[1:]  # ccache
    out = words.index("-o")
    words = ["clang++", *words[1:out], *words[out + 2:], "-fsyntax-only", "-Wthread-safety", "-Wno-unknown-warning-option"]
    return subprocess.run(words, cwd=c["directory"]).returncode
with ThreadPoolExecutor(int(sys.argv[2])) as pool: codes = list(pool.map(check, commands))
print(f"thread-safety: {len(codes)} files, {sum(c != 0 for c in codes)} failed")
sys.exit(any(codes))
PYTHON
      ;;
    # All kernels of the GPU, on the emulator: once, in the natural order, without the tests that compare
    # the bits of many calls. Of a list of placements, those of one slot, of two members with two, and of three.
    asan) sanitized asan address,undefined \
            '/orders$|^cuda_device_emulated/.*(Threads|Rows|ManyTiles)|^gpu_kernels_emulated/.*(Rows|Address)|^train/.*_(1x2|2x1|1x3|5x1|8x1)( |$)' \
            common spec data device nn optim numerics collective train server simulation \
            gpu_emulator gpu_stream_emulated cuda_device_emulated gpu_kernels_emulated ;;
    # Not simulation, which is of one thread. Of a list of placements, one slot has no others to race with, and two
    # members or five do as three do.
    tsan) TSAN_OPTIONS="halt_on_error=1" sanitized tsan thread '^train/.*_(1x1|2x1|5x1|8x1)( |$)' server collective train ;;
    *) echo "tests/checks.sh: no check called $check; there are format, thread-safety, asan, tsan" >&2; exit 2 ;;
  esac
done
