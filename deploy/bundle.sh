#!/usr/bin/env bash
# Makes dist/lockstep-VERSION-linux-x86_64.tar.zst: the programs, the CUDA module, every library they need but glibc's
# and NVIDIA's, the ready specs, and what tests/gpu/run.sh and tests/bench/run.sh gpu run. It is unpacked anywhere on a
# Linux with glibc 2.36 or later on x86-64, and needs no installation and no environment variable. The script tries its
# product before it leaves it.
# usage: deploy/bundle.sh [--with-data] [--xz] [--cpu]
#   --with-data  also MNIST, from $LOCKSTEP_DATA/mnist, so that the GPU's checks and figures are of real images
#   --xz         a .tar.xz, for machines without zstd
#   --cpu        without the CUDA module and the programs that test it (the toolkit is then not needed)
set -euo pipefail
cd "$(dirname "$0")/.."
readonly newest_glibc=2.36 most_mib=60 build=build-portable

fail() { echo "deploy/bundle.sh: $*" >&2; exit 1; }

data='' pack=(zstd -q -19 --long=27 -T0)  # programs share kernels: a window over all of them
ending=tar.zst cuda=ON suffix=''
for argument in "$@"; do
  case $argument in
    --with-data)
      data=${LOCKSTEP_DATA:?names the folder that holds mnist/, for --with-data}/mnist
      [ -f "$data/train-images-idx3-ubyte.gz" ] || fail "$data has no train-images-idx3-ubyte.gz" ;;
    --xz) pack=(xz -q -9 -T1) ending=tar.xz ;;
    --cpu) cuda=OFF suffix=-cpu ;;
    *) fail "no option $argument; there are --with-data, --xz, --cpu" ;;
  esac
done

mkdir -p dist
exec 9>dist/lock
flock 9
bash deploy/packages.sh bundle
cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLOCKSTEP_TESTS=ON -DLOCKSTEP_PORTABLE=ON \
  -DLOCKSTEP_CUDA=$cuda >$build.log 2>&1 || { cat $build.log >&2; rm -f $build.log; fail "cannot be configured"; }
mv $build.log $build/configure.log
programs=(lockstep lockstep-server lockstep-worker) checks=() modules=()
if [ $cuda = ON ]; then
  checks=(cuda_device_test gpu_kernels_test library_check cuda_train_test cuda_nccl_test gpu_floor
    gpu_convolutions_bench)
  modules=(liblockstep_cuda.so)
  [ ! -f "$(sed -n 's/^CUPTI_LIBRARY:FILEPATH=//p' $build/CMakeCache.txt)" ] || checks+=(gpu_trace)
fi
ninja -C $build "${programs[@]}" "${checks[@]}" ${modules:+lockstep_cuda} >$build/build.log 2>&1 ||
  { grep -Ev '^(ptxas info|\[[0-9]+/[0-9]+\]| +[0-9]+ bytes stack)' $build/build.log | tail -50 >&2
    fail "cannot be built"; }

# Code for the processor that happens to build it would not run on others. What has instruction sets of its own asks
# the processor first; the emulator is not part of the bundle.
python3 - $build/compile_commands.json <<'PYTHON' || fail "not for every x86-64 processor"
import json, re, sys
wrong = [c["file"] for c in json.load(open(sys.argv[1]))
         if re.search(r"-m(arch|tune)=", c["command"])
         or (re.search(r"-m(avx|fma|sse4|bmi)", c["command"]) and "/device/cpu/kernels/" not in c["file"]
             and "device_cuda_emulated" not in c["command"])]
print("\n".join(wrong), file=sys.stderr)
sys.exit(bool(wrong))
PYTHON

version=$(sed -n 's/^CMAKE_PROJECT_VERSION:STATIC=//p' $build/CMakeCache.txt)
name=lockstep-$version-linux-x86_64$suffix
stage=dist/$name
rm -rf "$stage"
mkdir -p "$stage"/{bin,lib,libexec,licenses,deploy/jobs,tests/gpu,tests/bench/specs,tests/numerics/goldens}
for p in "${programs[@]}"; do cp "$build/bin/$p" "$stage/bin/"; done
for c in "${checks[@]}"; do cp "$build/bin/$c"* "$stage/libexec/"; done
for m in "${modules[@]}"; do cp "$build/bin/$m" "$stage/lib/"; done
cp README.md LICENSE "$stage/"
cp deploy/jobs/*.yaml "$stage/deploy/jobs/"
cp tests/gpu/*.sh tests/gpu/*.py "$stage/tests/gpu/"
cp tests/bench/*.sh tests/bench/*.py "$stage/tests/bench/"
cp tests/numerics/goldens/*.json "$stage/tests/numerics/goldens/"
cp tests/bench/specs/*.yaml "$stage/tests/bench/specs/"
if [ -n "$data" ]; then mkdir -p "$stage/data/mnist" && cp "$data"/*-ubyte.gz "$stage/data/mnist/"; fi
revision=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision+=-changed
printf '%s\n' "version $version" "revision $revision" "built $(date -u +%Y-%m-%dT%H:%M:%SZ)" >"$stage/BUILD"

# Of the libraries: glibc's parts are the system's, NVIDIA's come with its toolkit, driver or wheels.
glibc='^(linux-vdso|ld-linux-x86-64|lib(c|m|pthread|dl|rt|resolv|util|anl|mvec))\.so'
nvidia='^lib(cuda|cupti|cublas|cudnn|nccl|nvrtc|nvJitLink)'
elves() { find "$1"/bin "$1"/lib "$1"/libexec -type f; }
taken=()
while read -r library path; do
  if [[ $library =~ $glibc || $library =~ $nvidia ]]; then continue; fi
  [ "$path" != not ] || fail "$library is needed, and not found"
  cp --dereference "$path" "$stage/lib/$library"
  taken+=("$path")
done < <(elves "$stage" | xargs ldd | awk '$2 == "=>" { print $1, $3 }' | sort -u)

# The licenses of what is not ours, whether it is beside the programs or linked into them.
{
  printf '%s\n' "${taken[@]}"
  (cd $build && ninja -t commands "${programs[@]}" "${checks[@]}") | grep -o ' /usr/lib/[^ ]*\.a\>' || true
} | sort -u | xargs readlink -f | sort -u | while read -r path; do dpkg -S "$path" 2>/dev/null ||
  dpkg -S "${path#/usr}" 2>/dev/null || true; done | cut -d: -f1 | sort -u | while read -r package; do
  [ ! -f "/usr/share/doc/$package/copyright" ] || cp "/usr/share/doc/$package/copyright" "$stage/licenses/$package"
done

elves "$stage" | xargs chmod 755
elves "$stage" | xargs strip --strip-unneeded
newest=$(elves "$stage" | xargs objdump -T 2>/dev/null | grep -o 'GLIBC_[0-9][0-9.]*' | sort -uV | tail -1)
[ "$(printf '%s\n' "GLIBC_$newest_glibc" "$newest" | sort -V | tail -1)" = "GLIBC_$newest_glibc" ] ||
  fail "needs $newest, and $newest_glibc is promised"

archive=dist/$name.$ending
date=$(git log -1 --format=%ct 2>/dev/null || date +%s)
tar -C dist --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$date" -cf "dist/$name.tar" "$name"
"${pack[@]}" -c "dist/$name.tar" >"$archive"
rm "dist/$name.tar"
bytes=$(stat -c %s "$archive")
[ "$bytes" -le $((most_mib << 20)) ] || fail "$archive has $((bytes >> 20)) MiB, and at most $most_mib are allowed"

# As a user has it: elsewhere, and with nothing in the environment.
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
tar -C "$elsewhere" -xf "$archive"
there=$elsewhere/$name
while read -r library path; do
  if [[ $library =~ $glibc || $library =~ $nvidia || $path == "$there/lib/"* ]]; then continue; fi
  fail "$library is taken from $path and not from the bundle"
done < <(find "$there"/bin "$there"/libexec "$there"/lib/liblockstep* -type f | xargs env -i /usr/bin/ldd | awk '$2 == "=>" { print $1, $3 }' |
  while read -r l p; do echo "$l $(readlink -f "$p" || true)"; done | sort -u)
alone() { (cd "$elsewhere" && env -i "$there/bin/lockstep" "$@"); }
alone --version >/dev/null || fail "lockstep --version fails"
alone doctor >"$elsewhere/doctor" || fail "lockstep doctor fails"
if [ $cuda = ON ] && ! grep -q "module  *$there/lib/" "$elsewhere/doctor"; then
  cat "$elsewhere/doctor" >&2
  fail "the CUDA module is not found in lib/"
fi
synthetic='data={format: synthetic, shape: [28, 28, 1], train_samples: 1000, validation_samples: 100}'
alone run "$there/deploy/jobs/mlp.yaml" --set "$synthetic" \
  --set train.steps=3 --workers 2 --slots 1 --out "$elsewhere/run" -o json >"$elsewhere/result" ||
  fail "a training of three steps fails"
grep -q '"state":"SUCCEEDED"' "$elsewhere/result" || fail "a training of three steps does not succeed"

echo "$archive: $(numfmt --to=iec --suffix=B "$bytes"), revision $revision, needs $newest"
