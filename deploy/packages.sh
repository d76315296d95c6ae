#!/usr/bin/env bash
# Installs the distribution's packages that Lockstep needs (Debian 12). usage: deploy/packages.sh build|test|bundle
# Touches no package manager when everything is there; asks nothing; works as root or with sudo.
set -euo pipefail

packages=(g++ cmake ninja-build ccache lld pkg-config
  libgrpc++-dev libgrpc-dev protobuf-compiler-grpc protobuf-compiler libprotobuf-dev libabsl-dev
  libyaml-cpp-dev libcli11-dev libspdlog-dev libfmt-dev nlohmann-json3-dev libsqlite3-dev
  libdnnl-dev libgloo-dev zlib1g-dev liblzma-dev libssl-dev
  dataset-fashion-mnist)
if [ "${1:-build}" = test ]; then
  packages+=(clang clang-format libclang-rt-14-dev libgtest-dev libgmock-dev libbenchmark-dev iproute2 procps python3 zstd)
elif [ "${1:-build}" = bundle ]; then
  packages+=(libgtest-dev libgmock-dev binutils python3 zstd xz-utils)
fi

missing=()
for p in "${packages[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "deploy/packages.sh: these packages are missing and need root to install: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "Installing ${#missing[@]} packages of the distribution: ${missing[*]}"
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
"${apt[@]}" update </dev/null
"${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null
