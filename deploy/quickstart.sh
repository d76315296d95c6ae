#!/usr/bin/env bash
# From a fresh Debian 12 machine to a trained model: installs what is missing, builds the three programs
# into build/bin, and trains a convolutional network on Fashion-MNIST with a real coordinator and worker.
# usage: deploy/quickstart.sh [arguments of `lockstep run`]
set -euo pipefail
cd "$(dirname "$0")/.."

bash deploy/packages.sh build
if [ ! -f build/build.ninja ]; then
  echo "Configuring (build/)"
  cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLOCKSTEP_TESTS=OFF >build.log 2>&1 || {
    cat build.log >&2; rm -f build.log; exit 1; }
  mv build.log build/configure.log
fi
programs=(lockstep lockstep-server lockstep-worker)
if [ -x build/bin/lockstep ] && [ -x build/bin/lockstep-server ] && [ -x build/bin/lockstep-worker ]; then
  ninja -C build "${programs[@]}" >build/build.log 2>&1 || { cat build/build.log >&2; exit 1; }
else
  echo "Building lockstep, lockstep-server and lockstep-worker (some minutes the first time)"
  ninja -C build "${programs[@]}"
fi
exec build/bin/lockstep run deploy/jobs/fashion-cnn.yaml "$@"
