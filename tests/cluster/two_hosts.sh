#!/usr/bin/env bash
# Trains SPEC on two hosts and leaves what `lockstep submit --follow -o json` printed in OUT/result.json.
# The hosts are network namespaces of an unprivileged user, joined by a veth pair; where the machine
# refuses them, they are 127.0.0.1 and 127.0.0.2 with distinct --host-id. Prints which it was.
# usage: two_hosts.sh BIN SPEC OUT
set -euo pipefail
bin=$1 spec=$2 out=$3 inside=${4:-}
mkdir -p "$out"

can_make_hosts() {
  unshare --user --map-root-user --net bash -c '
    unshare --net sleep 2 & sleep 0.2
    ip link add veth0 type veth peer name veth1 netns $! && kill $!' >/dev/null 2>&1
}

if [ -z "$inside" ]; then
  if can_make_hosts; then
    exec unshare --user --map-root-user --net --kill-child bash "$0" "$bin" "$spec" "$out" namespaces
  fi
  exec bash "$0" "$bin" "$spec" "$out" loopback
fi

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait' EXIT
here=() there=() first=127.0.0.1 second=127.0.0.2
extra_first=(--host-id first) extra_second=(--host-id second)
if [ "$inside" = namespaces ]; then
  first=10.77.0.1 second=10.77.0.2
  extra_first=() extra_second=()  # the default host id tells network namespaces apart
  unshare --net sleep 600 &
  pids+=($!)
  other=$!
  # The child's namespace exists once it differs from ours.
  for _ in $(seq 100); do
    [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break
    sleep 0.05
  done
  there=(nsenter "--net=/proc/$other/ns/net")
  ip link set lo up
  ip link add veth0 type veth peer name veth1 netns "$other"
  ip addr add 10.77.0.1/24 dev veth0
  ip link set veth0 up
  "${there[@]}" ip link set lo up
  "${there[@]}" ip addr add 10.77.0.2/24 dev veth1
  "${there[@]}" ip link set veth1 up
fi

"$bin/lockstep-server" --listen "$first:0" --data-dir "$out/server" --insecure --ready-fd 3 \
  3>"$out/address" 2>"$out/server.log" &
pids+=($!)
for _ in $(seq 200); do [ -s "$out/address" ] && break; sleep 0.05; done
address=$(cat "$out/address")
"${here[@]}" "$bin/lockstep-worker" --coordinator "$address" --insecure --slots cpu:1 --name first \
  --advertise "$first" "${extra_first[@]}" --work-dir "$out/first" 2>"$out/first.log" &
pids+=($!)
"${there[@]}" "$bin/lockstep-worker" --coordinator "$address" --insecure --slots cpu:1 --name second \
  --advertise "$second" "${extra_second[@]}" --work-dir "$out/second" 2>"$out/second.log" &
pids+=($!)
for _ in $(seq 200); do
  [ "$("$bin/lockstep" workers --coordinator "$address" --insecure -o json 2>/dev/null | grep -o '"name"' | wc -l)" = 2 ] && break
  sleep 0.05
done
"$bin/lockstep" submit "$spec" --set resources.slots=2 --follow -o json --coordinator "$address" --insecure \
  >"$out/result.json" 2>"$out/client.log"
echo "$inside"
