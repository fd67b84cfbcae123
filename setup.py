"""Builds mtlfast._C, one extension for every machine (see csrc/README.md).

The kernels include no torch header, so they are compiled apart from the glue, by rules written here: every
`csrc/cpu` kernel once per instruction set, every `csrc/cuda/*.cu` by nvcc where one is found. Their objects and the
static CUDA runtime are linked with the glue, which torch's own BuildExtension compiles.

Environment:
    MTLFAST_NATIVE=0    builds no extension
    MTLFAST_CUDA        auto: CUDA kernels if there is an nvcc that compiles them; 1: or it is an error; 0: none
    MTLFAST_WERROR=1    a warning is an error, as in the Makefile
    MTLFAST_SANITIZE=1  the host's code reports bad addresses and undefined behaviour (`make asan`)
    and CUDA_HOME, TORCH_CUDA_ARCH_LIST, CXX, MAX_JOBS
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

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
sys.path.insert(0, str(CSRC))
from toolkit import Toolkit, cuda_kernels, cuda_toolkit, gencode, output_of, say  # noqa: E402

CXX = os.environ.get("CXX", "g++")
WERROR = os.environ.get("MTLFAST_WERROR", "0") == "1"
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", *["-Werror"] * WERROR, "-fvisibility=hidden"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
SANITIZE_FLAGS = SANITIZE if os.environ.get("MTLFAST_SANITIZE", "0") == "1" else []
NVCC_FLAGS = ["-std=c++20", "-O3", *["--Werror=all-warnings"] * WERROR, "-Xptxas=-v"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-Wall,-fvisibility=hidden"]

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


def compile_kernels(folder: Path, toolkit: Toolkit | None) -> list[str]:
    """Compiles every kernel into `folder` with ninja, as far as it is out of date; returns the objects."""
    rules = [
        f"rule cxx\n  command = {CXX} {' '.join(CXX_FLAGS + SANITIZE_FLAGS)} $flags -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  description = $what\n"
    ]
    objects = []

    def build(rule: str, source: Path, name: str, flags: str = "") -> None:
        objects.append(str(folder / name))
        rules.append(f"build {folder / name}: {rule} {source}\n  flags = {flags}\n  what = {rule} {name[:-2]}\n")

    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name == "dispatch.cpp":
            build("cxx", source, "dispatch.o")
            continue
        for isa, (width, flags) in CPU_UNITS.items():
            defines = f"-DMTLFAST_ISA={isa} -DMTLFAST_VECTOR_BYTES={width}"
            build("cxx", source, f"{source.stem}.{isa}.o", f"{defines} {' '.join(flags)}")
    if toolkit is not None:
        archs = " ".join(gencode(toolkit.archs))
        # ptxas says what each kernel takes; it is read below, and shown only if the compilation fails.
        command = f"{toolkit.nvcc} {' '.join(NVCC_FLAGS)} {archs} -MMD -MF $out.d -c $in -o $out"
        command += " >$out.log 2>&1 || (cat $out.log && false)"
        rules.append(f"rule nvcc\n  command = {command}\n  depfile = $out.d\n  description = $what\n")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            build("nvcc", source, f"{source.stem}.cuda.o")
        if len(toolkit.archs) > 1:
            say(
                f"compiling CUDA kernels for {', '.join(toolkit.archs)}; TORCH_CUDA_ARCH_LIST=8.6, for example, "
                "compiles for one kind of GPU, MTLFAST_CUDA=0 for none"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(rules))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    run_ninja(["-C", str(folder), *jobs])
    return objects


def run_ninja(arguments: list[str]) -> None:
    """Says what has been compiled as it goes; what compilers say goes to standard output."""
    command = [sys.executable, "-m", "ninja", *arguments]
    environment = {**os.environ, "NINJA_STATUS": "[%f of %t, %e s] "}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as ninja:
        assert ninja.stdout is not None
        for line in ninja.stdout:
            if line.startswith("["):
                say(line.rstrip())
            else:
                sys.stdout.write(line)
    if ninja.returncode != 0:
        sys.exit(
            "mtlfast: a kernel does not compile; MTLFAST_CUDA=0 leaves out CUDA, MTLFAST_NATIVE=0 all compiled code"
        )


def build_facts(toolkit: Toolkit | None, without_cuda: str, kernels: Path) -> dict[str, object]:
    """What `python -m mtlfast info` shows of the build, and what the import checks."""
    return {
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "compiler": (output_of(CXX, "--version").splitlines() or ["unknown"])[0],
        "cpu_units": list(CPU_UNITS),
        "nvcc": toolkit.version if toolkit else None,
        "nvcc_found": f"{toolkit.found}: {toolkit.nvcc}" if toolkit else None,
        "without_cuda": without_cuda,
        "cuda_archs": toolkit.archs if toolkit else [],
        "cuda_kernels": cuda_kernels(kernels) if toolkit else {},
        "commit": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty").strip() or "unknown",
    }


class BuildKernelsAndGlue(BuildExtension):
    """torch's BuildExtension for the glue, after the kernels."""

    def build_extensions(self) -> None:
        """Compiles kernels, then the glue, and writes down what was built."""
        (extension,) = self.extensions
        if self.editable_mode:  # pip names a new folder each time, and everything would be compiled again
            self.build_temp = str(ROOT / "build" / "inplace")
        toolkit, without_cuda = cuda_toolkit()
        kernels = Path(self.build_temp).resolve() / "kernels"
        extension.extra_objects = compile_kernels(kernels, toolkit)
        if toolkit is not None:
            extension.define_macros.append(("MTLFAST_WITH_CUDA", None))
            extension.extra_link_args += toolkit.runtime
        say(f"compiling what calls them from torch {torch.__version__}: {len(extension.sources)} files")
        super().build_extensions()
        facts = Path(self.build_lib) / "mtlfast" / "_build.json"
        facts.write_text(json.dumps(build_facts(toolkit, without_cuda, kernels), indent=2) + "\n")

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
            *["-Werror"] * WERROR,
            "-fvisibility=hidden",
            *SANITIZE_FLAGS,
        ],
        extra_link_args=["-fopenmp", "-Wl,--exclude-libs,ALL", *SANITIZE_FLAGS],
        define_macros=[],
    )


if os.environ.get("MTLFAST_NATIVE", "1") == "0":
    setup(install_requires=["torch>=2.11"])
else:
    # torch promises no ABI beyond its minor version, so what is built here is for that one.
    minor = ".".join(torch.__version__.split(".")[:2])
    setup(
        install_requires=[f"torch=={minor}.*"],
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildKernelsAndGlue},
    )
