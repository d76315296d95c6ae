#!/bin/sh
# usage: shared_symbols.sh NM OBJECT...
# Fails if an object file of the CPU kernels defines a symbol that the linker may merge with one of
# another file (weak or unique): code for AVX-512 would then run on processors without it.
nm=$1
shift
[ $# -gt 0 ] || { echo "no object files given"; exit 1; }
shared=$("$nm" -C --defined-only "$@" | grep -E '^[0-9a-f]* [WVuwv] ')
[ -z "$shared" ] || { echo "shared symbols:"; echo "$shared" | head -20; exit 1; }
