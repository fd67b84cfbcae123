#!/usr/bin/env bash
# bash docs/design/wheels/build.sh KERNELS OUT: links the kernels of any build of mtlfast (the folder of *.baseline.o) with the
# skeleton, compiled against the torch and Python of $PYTHON, into OUT/_skeleton.abi3.so.
set -euo pipefail
cd "$(dirname "$0")"
kernels=$1 out=$2 python=${PYTHON:-python3}
torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
flags=(-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -I../../../csrc -isystem "$torch/include" -isystem "$headers")
mkdir -p "$out"
g++ "${flags[@]}" -DTORCH_TARGET_VERSION=0x020b000000000000 -c norms.cpp -o "$out/norms.o"
g++ "${flags[@]}" -c module.cpp -o "$out/module.o"
g++ -shared -Wl,--exclude-libs,ALL "$out/norms.o" "$out/module.o" "$kernels"/{dispatch,*.baseline,*.avx2,*.avx512}.o \
  -L"$torch/lib" -ltorch_cpu -o "$out/_skeleton.abi3.so"
