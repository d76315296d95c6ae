#!/usr/bin/env bash
# Installs what is missing, builds everything into build/, runs every test.
# usage: tests/run.sh [arguments of ctest, e.g. -R spec/]
set -euo pipefail
cd "$(dirname "$0")/.."

bash deploy/packages.sh test
cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLOCKSTEP_TESTS=ON
ninja -C build
exec ctest --test-dir build --output-on-failure -j "$(nproc)" "$@"
