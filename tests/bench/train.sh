#!/usr/bin/env bash
# Samples per second of the ready specs on 1x1, 1x2 and 2x1 (workers x slots), interleaved; medians of
# REPEATS (default 3), and whether every placement ended with the same digest. usage: tests/bench/train.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for repeat in $(seq "${REPEATS:-3}"); do
  for placement in "1 1" "1 2" "2 1"; do
    read -r workers slots <<<"$placement"
    for job in "mlp 2000" "fashion-cnn 300"; do
      read -r name steps <<<"$job"
      build/bin/lockstep run "deploy/jobs/$name.yaml" --workers "$workers" --slots "$slots" \
        --set train.steps="$steps" --set data.validation_samples=1000 --out "$out/run" -o json 2>/dev/null |
        tail -n 1 >"$out/$name.${workers}x$slots.$repeat.json"
      rm -rf "$out/run"
    done
  done
done
python3 - "$out" <<'PYTHON'
import glob, json, statistics, sys
rows = {}
for path in glob.glob(sys.argv[1] + "/*.json"):
    name, placement, _, _ = path.rsplit("/", 1)[1].split(".")
    result = json.load(open(path))
    rows.setdefault(name, {}).setdefault(placement, []).append((result["samples_per_second"], result["state_digest"]))
print("| job | 1x1 | 1x2 | 2x1 | 1x2 / 1x1 | same bits |\n|---|---|---|---|---|---|")
for name, placements in sorted(rows.items()):
    median = {p: statistics.median(s for s, _ in runs) for p, runs in placements.items()}
    same = len({d for runs in placements.values() for _, d in runs}) == 1
    print(f"| {name} | {median['1x1']:,.0f} | {median['1x2']:,.0f} | {median['2x1']:,.0f} | "
          f"{median['1x2'] / median['1x1']:.2f} | {'yes' if same else 'NO'} |")
PYTHON
