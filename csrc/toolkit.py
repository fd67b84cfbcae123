"""The CUDA compiler that setup.py builds with: which it is, whether it is new enough, for which GPUs it compiles."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# A launch passes 32 KiB by value: nvcc compiles that since 12.1, and GPUs take it since compute capability 7.0.
OLDEST_NVCC, OLDEST_ARCH = (12, 1), 70


def output_of(*command: str) -> str:
    """Standard output and error of a command, or '' if it fails."""
    try:
        return subprocess.run(
            command, check=True, text=True, errors="replace", stdout=-1, stderr=subprocess.STDOUT
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def say(line: str) -> None:
    """To the terminal, where there is one, as pip shows what a build prints only once it has failed."""
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"mtlfast: {line}", file=terminal)
    except OSError:
        print(f"mtlfast: {line}", file=sys.stderr, flush=True)


class Toolkit(NamedTuple):
    """The CUDA compiler in use."""

    nvcc: Path
    found: str  # where it was looked for
    version: str
    archs: list[str]  # to compile for
    runtime: list[str]  # linker words for the static CUDA runtime


class Unfit(Exception):
    """Why no CUDA kernels can be built here."""


def find_nvccs() -> Iterator[tuple[Path, str]]:
    """Every nvcc on the PATH, in CUDA_HOME and from the PyPI package nvidia-cuda-nvcc, and where it was found."""
    candidates = {
        "on the PATH": [shutil.which("nvcc")],
        "in CUDA_HOME": [Path(os.environ.get("CUDA_HOME", "")) / "bin" / "nvcc"],
        "from PyPI": [n for p in sys.path for n in sorted((Path(p) / "nvidia").glob("*/bin/nvcc"), reverse=True)],
    }
    for found, paths in candidates.items():
        for path in paths:
            if path and os.access(path, os.X_OK) and Path(path).is_file():
                yield Path(path), found


def new_enough_nvcc() -> tuple[Path, str, re.Match[str]]:
    """The first nvcc that compiles the kernels, which it is, and its version; raises Unfit if there is none."""
    reasons = []
    for nvcc, found in find_nvccs():
        version = re.search(r"V(\d+)\.(\d+)[.\d]*", output_of(str(nvcc), "--version"))
        if version is None:
            reasons.append(f"{nvcc} --version names no version, expected a CUDA compiler")
        elif (int(version[1]), int(version[2])) < OLDEST_NVCC:
            reasons.append(f"{nvcc} is nvcc {version[1]}.{version[2]}, expected 12.1 or newer")
        else:
            return nvcc, found, version
    raise Unfit("; ".join(reasons) or "no nvcc is on the PATH, in CUDA_HOME/bin or among Python's packages")


def cuda_toolkit() -> tuple[Toolkit | None, str]:
    """The nvcc to use and ''; None and the reason to build without CUDA kernels."""
    wanted = os.environ.get("MTLFAST_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"MTLFAST_CUDA is {wanted}, expected auto, 1 or 0")
    if wanted == "0":
        return None, "MTLFAST_CUDA=0"
    try:
        return fitting_toolkit(drop_archs=wanted == "auto"), ""
    except Unfit as reason:
        if wanted == "1":
            sys.exit(f"MTLFAST_CUDA=1, but {reason}")
        say(f"no CUDA kernels are built, as {reason}")
        return None, str(reason)


def fitting_toolkit(drop_archs: bool) -> Toolkit:
    """The nvcc to use; raises Unfit if it cannot compile the kernels (drop_archs: for any of the architectures)."""
    nvcc, found, version = new_enough_nvcc()
    archs = cuda_archs()
    unknown = [arch for arch in archs if not compiles_for(nvcc, arch)]
    kept = [arch for arch in archs if arch not in unknown]
    if unknown:
        without = f"nvcc {version[1]}.{version[2]} cannot compile the kernels for {', '.join(unknown)}"
        if not kept or not drop_archs:
            raise Unfit(f"{without} (TORCH_CUDA_ARCH_LIST says for what)")
        if any(arch.endswith("+PTX") for arch in unknown):  # newer GPUs compile the newest that there is
            kept[-1] = kept[-1].removesuffix("+PTX") + "+PTX"
        say(f"{without}: CUDA kernels are built for {', '.join(kept)}")
    return Toolkit(nvcc, found, version[0][1:], kept, static_runtime(nvcc))


def cuda_archs() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else this machine's GPUs, else every supported architecture ('all')."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,\t\n")
    if wanted == "all":
        wanted = DEFAULT_ARCHS
    if not wanted:
        from torch import cuda

        pairs = {cuda.get_device_capability(d) for d in range(cuda.device_count())} if cuda.is_available() else set()
        wanted = ";".join(f"{major}.{minor}" for major, minor in sorted(pairs))
    return re.split(r"[;,\s]+", wanted or DEFAULT_ARCHS)


def number_of(arch: str) -> str:
    """'9.0+PTX' -> '90'."""
    return arch.removesuffix("+PTX").replace(".", "")


def compiles_for(nvcc: Path, arch: str) -> bool:
    """Does nvcc know an architecture, and does it run the kernels?"""
    known = re.findall(r"compute_(\d+)", output_of(str(nvcc), "--list-gpu-arch"))
    number = number_of(arch).rstrip("af")  # of architecture- and family-specific code nvcc lists the plain name alone
    return number in known and int(number) >= OLDEST_ARCH


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags: SASS for each architecture, and PTX too where it says so.

    Nearly all of nvcc's time goes from C++ to PTX: architectures of one generation share the PTX of their oldest.
    """
    flags, numbers = [], [number_of(arch) for arch in archs]
    for arch, number in zip(archs, numbers, strict=True):
        generation = [n for n in numbers if n.isdigit() and n[:-1] == number[:-1]]  # none for the likes of 9.0a
        shared = min(generation, key=int, default=number)
        flags.append(f"-gencode=arch=compute_{shared},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def static_runtime(nvcc: Path) -> list[str]:
    """Linker words for the static CUDA runtime."""
    # The nvcc on the PATH may be a wrapper script: a dry run prints where its toolkit and libraries really are.
    dry_run = output_of(str(nvcc), "--dryrun", "-c", "x.cu")
    top = re.search(r"TOP=(.+)", dry_run)
    if top is None:
        raise Unfit(f"{nvcc} --dryrun prints no TOP=, expected a CUDA compiler")
    home = Path(top[1].strip()).resolve()
    inside = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    for folder in (*(home / name for name in inside), *map(Path, re.findall(r'"-L([^"]+)"', dry_run))):
        if (archive := folder / "libcudart_static.a").exists():
            return [str(archive), "-ldl", "-lrt", "-lpthread"]
    raise Unfit(f"{home} holds no libcudart_static.a, which the extension links (PyPI: nvidia-cuda-runtime)")


def cuda_kernels(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """What ptxas said: for each architecture, each kernel's registers, bytes of stack, spills and shared memory."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
        re.DOTALL,
    )
    found = [m for log in sorted(folder.glob("*.cuda.o.log")) for m in entry.finditer(log.read_text())]
    names = output_of("c++filt", *(m["name"] for m in found)).splitlines()
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for m, name in zip(found, names, strict=True):
        short = name.split("(")[0].removeprefix("void ").replace("mtlfast::cuda::", "")
        kernels.setdefault(m["arch"], {})[short] = {
            "registers": int(m["registers"]),
            "stack": int(m["stack"]),
            "spilled": int(m["stores"]) + int(m["loads"]),
            "shared": int(m["shared"] or 0),
        }
    return kernels
