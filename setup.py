"""Builds mtlfast._C, one extension for every machine (see csrc/README.md).

The kernels include no torch header, so they are compiled apart from the glue, by rules written here: every
`csrc/cpu` kernel once per instruction set, every `csrc/cuda/*.cu` by nvcc where one is found. Their objects and the
static CUDA runtime are linked with the glue, which torch's own BuildExtension compiles.

Environment: MTLFAST_NATIVE=0 builds no extension; MTLFAST_CUDA=auto|1|0; MTLFAST_SANITIZE=1 has the host's code report
bad addresses and undefined behaviour (see `make asan`); CUDA_HOME, TORCH_CUDA_ARCH_LIST, CXX, MAX_JOBS
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "mtlfast builds against the torch that will run it: install torch first, then type "
        "`pip install --no-build-isolation .`"
    )
from setuptools import setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
SANITIZE_FLAGS = SANITIZE if os.environ.get("MTLFAST_SANITIZE", "0") == "1" else []
NVCC_FLAGS = ["-std=c++20", "-O3", "--Werror=all-warnings", "-Xptxas=-v", "-Xcompiler=-fPIC,-Wall,-fvisibility=hidden"]
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

# Instruction set -> its vector's bytes and the compiler's flags; mtlfast chooses among them when it runs.
CPU_UNITS = {"baseline": (16, [])}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_UNITS["avx2"] = (32, ["-mavx2", "-mfma", "-mf16c"])
    CPU_UNITS["avx512"] = (
        64,
        [
            "-mavx512f",
            "-mavx512vl",
            "-mavx512bw",
            "-mavx512dq",
            "-mfma",
            "-mf16c",
            "-mprefer-vector-width=512",
        ],
    )


def output_of(*command: str) -> str:
    """Standard output and error of a command, or '' if it fails."""
    try:
        return subprocess.run(command, check=True, text=True, stdout=-1, stderr=subprocess.STDOUT, cwd=ROOT).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


class Toolkit(NamedTuple):
    """The CUDA compiler in use."""

    nvcc: Path
    found: str  # where it was looked for
    home: Path  # of its headers and libraries


def find_nvcc() -> tuple[Path, str] | None:
    """nvcc on the PATH, in CUDA_HOME, or from the PyPI package nvidia-cuda-nvcc, in that order; and which it is."""
    candidates = {
        "on the PATH": [shutil.which("nvcc")],
        "in CUDA_HOME": [Path(os.environ.get("CUDA_HOME", "")) / "bin" / "nvcc"],
        "from PyPI": [n for p in sys.path for n in sorted((Path(p) / "nvidia").glob("*/bin/nvcc"), reverse=True)],
    }
    for found, paths in candidates.items():
        for path in paths:
            if path and os.access(path, os.X_OK) and Path(path).is_file():
                return Path(path), found
    return None


def cuda_toolkit() -> Toolkit | None:
    """The nvcc to use and its toolkit's home; None to build without CUDA kernels."""
    wanted = os.environ.get("MTLFAST_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"MTLFAST_CUDA is {wanted}, expected auto, 1 or 0")
    compiler = find_nvcc() if wanted != "0" else None
    if compiler is None:
        if wanted == "1":
            sys.exit("MTLFAST_CUDA=1, but no nvcc is on the PATH, in CUDA_HOME/bin or among Python's packages")
        return None
    # The nvcc on the PATH may be a wrapper script: a dry run prints where the toolkit really is.
    top = re.search(r"TOP=(.+)", output_of(str(compiler[0]), "--dryrun", "-c", "x.cu"))
    if top is None:
        sys.exit(f"{compiler[0]} --dryrun prints no TOP=, expected a CUDA compiler")
    return Toolkit(*compiler, Path(top.group(1).strip()).resolve())


def cuda_archs() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else this machine's GPUs, else every supported architecture ('all')."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted == "all":
        wanted = DEFAULT_ARCHS
    if not wanted and torch.cuda.is_available():
        pairs = {torch.cuda.get_device_capability(d) for d in range(torch.cuda.device_count())}
        wanted = ";".join(f"{major}.{minor}" for major, minor in sorted(pairs))
    return re.split(r"[;, ]+", wanted or DEFAULT_ARCHS)


def gencode(arch: str) -> list[str]:
    """nvcc's flags for one entry of the list: SASS, and PTX too where it says so."""
    number = arch.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    return [*flags, f"-gencode=arch=compute_{number},code=compute_{number}"] if arch.endswith("+PTX") else flags


def static_runtime(home: Path) -> list[str]:
    """Linker words for the static CUDA runtime."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (archive := home / folder / "libcudart_static.a").exists():
            return [str(archive), "-ldl", "-lrt", "-lpthread"]
    sys.exit(f"{home} holds no libcudart_static.a, which the extension links (PyPI: nvidia-cuda-runtime)")


def compile_kernels(folder: Path, toolkit: Toolkit | None) -> list[str]:
    """Compiles every kernel into `folder` with ninja, as far as it is out of date; returns the objects."""
    rules = [
        f"rule cxx\n  command = {CXX} {' '.join(CXX_FLAGS + SANITIZE_FLAGS)} $flags -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  description = c++ $out\n"
    ]
    objects = []

    def build(rule: str, source: Path, name: str, flags: str = "") -> None:
        objects.append(str(folder / name))
        rules.append(f"build {folder / name}: {rule} {source}\n  flags = {flags}\n")

    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name == "dispatch.cpp":
            build("cxx", source, "dispatch.o")
            continue
        for isa, (width, flags) in CPU_UNITS.items():
            defines = f"-DMTLFAST_ISA={isa} -DMTLFAST_VECTOR_BYTES={width}"
            build("cxx", source, f"{source.stem}.{isa}.o", f"{defines} {' '.join(flags)}")
    if toolkit is not None:
        archs = " ".join(flag for arch in cuda_archs() for flag in gencode(arch))
        # ptxas says what each kernel takes; it is read below, and shown only if the compilation fails.
        command = f"{toolkit.nvcc} {' '.join(NVCC_FLAGS)} {archs} -MMD -MF $out.d -c $in -o $out"
        command += " >$out.log 2>&1 || (cat $out.log && false)"
        rules.append(f"rule nvcc\n  command = {command}\n  depfile = $out.d\n  description = nvcc $out\n")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            build("nvcc", source, f"{source.stem}.cuda.o")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(rules))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), *jobs], check=True)
    return objects


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


def build_facts(toolkit: Toolkit | None, kernels: Path) -> dict[str, object]:
    """What `python -m mtlfast info` shows of the build, and what the import checks."""
    nvcc_version = re.search(r"V([\d.]+)", output_of(str(toolkit.nvcc), "--version")) if toolkit else None
    return {
        "torch": torch.__version__,
        "compiler": (output_of(CXX, "--version").splitlines() or ["unknown"])[0],
        "cpu_units": list(CPU_UNITS),
        "nvcc": nvcc_version.group(1) if nvcc_version else None,
        "nvcc_found": f"{toolkit.found}: {toolkit.nvcc}" if toolkit else None,
        "cuda_archs": cuda_archs() if toolkit else [],
        "cuda_kernels": cuda_kernels(kernels) if toolkit else {},
        "commit": output_of("git", "describe", "--always", "--dirty").strip() or "unknown",
    }


class BuildKernelsAndGlue(BuildExtension):
    """torch's BuildExtension for the glue, after the kernels."""

    def build_extensions(self) -> None:
        """Compiles kernels, then the glue, and writes down what was built."""
        (extension,) = self.extensions
        if self.editable_mode:  # pip names a new folder each time, and everything would be compiled again
            self.build_temp = str(ROOT / "build" / "inplace")
        toolkit = cuda_toolkit()
        kernels = Path(self.build_temp).resolve() / "kernels"
        extension.extra_objects = compile_kernels(kernels, toolkit)
        if toolkit is not None:
            extension.define_macros.append(("MTLFAST_WITH_CUDA", None))
            extension.extra_link_args += static_runtime(toolkit.home)
        super().build_extensions()
        facts = Path(self.build_lib) / "mtlfast" / "_build.json"
        facts.write_text(json.dumps(build_facts(toolkit, kernels), indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """In-place builds: the facts go where the extension goes."""
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / "mtlfast" / "_build.json", ROOT / "mtlfast")


def extension() -> CppExtension:
    """The one extension: the glue's sources, all against torch's headers."""
    glue = ["bindings", "graph", "task_table", *sorted(p.stem for p in CSRC.glob("ops_*.cpp"))]
    return CppExtension(
        "mtlfast._C",
        [f"csrc/{name}.cpp" for name in glue],
        # Without -fopenmp at::parallel_for runs on one thread and says nothing.
        extra_compile_args=[
            "-std=c++20",
            "-O3",  # the solvers on the CPU are glue
            "-g0",
            "-fopenmp",
            "-Wall",
            "-Werror",
            "-fvisibility=hidden",
            *SANITIZE_FLAGS,
        ],
        extra_link_args=["-fopenmp", "-Wl,--exclude-libs,ALL", *SANITIZE_FLAGS],
        define_macros=[],
    )


OTHER_PACKAGES = ["typer>=0.12", "rich>=13"]
if os.environ.get("MTLFAST_NATIVE", "1") == "0":
    setup(install_requires=["torch>=2.11", *OTHER_PACKAGES])
else:
    # torch promises no ABI beyond its minor version, so what is built here is for that one.
    minor = ".".join(torch.__version__.split(".")[:2])
    setup(
        install_requires=[f"torch=={minor}.*", *OTHER_PACKAGES],
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildKernelsAndGlue},
    )
