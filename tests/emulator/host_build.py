"""Compiles CUDA kernels, and what calls them, for the CPU."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
CUDA = CHECKOUT / "csrc" / "cuda"
CXX = os.environ.get("CXX", "g++")
AVAILABLE = CUDA.exists() and shutil.which(CXX) is not None
SANITIZE = os.environ.get("MTLFAST_EMULATOR_SANITIZE", "alignment")  # make emu-asan: address,undefined
FLAGS = (
    "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -fno-omit-frame-pointer "
    "-fno-sanitize-recover=all -Wall -Wextra -Werror -Wno-unknown-pragmas"
)


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = (), sanitize: str = SANITIZE) -> str:
    """Compiles CUDA or C++ sources with the host compiler into a library in build/emulator: its path."""
    base = [
        *FLAGS.split(),
        f"-fsanitize={sanitize}",
        f"-I{HERE / 'include'}",
        f"-I{HERE}",
        f"-I{CHECKOUT / 'csrc'}",
        *flags,
    ]
    tag = hashlib.sha256(" ".join([CXX, *base]).encode()).hexdigest()[:12]
    folder = CHECKOUT / "build" / "emulator" / f"{name}-{tag}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.stem}.o" for source in sources]
    rules = [
        f"rule cxx\n  command = {CXX} {' '.join(base)} -MMD -MF $out.d -x c++ -c $in -o $out\n  depfile = $out.d\n"
    ]
    rules += [f"rule link\n  command = {CXX} -shared -fsanitize={sanitize} $in -o $out\n"]
    rules += [f"build {o}: cxx {source}\n" for o, source in zip(objects, sources, strict=True)]
    rules += [f"build {folder / 'lib.so'}: link {' '.join(map(str, objects))}\n"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist may have several processes here at once
        (folder / "build.ninja").write_text("\n".join(rules))
        run = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the emulator does not compile:\n{run.stdout[-5000:]}")
    return str(folder / "lib.so")
