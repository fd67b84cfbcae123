"""Reads the GPU code in the compiled extension: its architectures, its PTX, and the instructions of every kernel."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


def find_cuobjdump() -> Path | None:
    """The path of cuobjdump with nvdisasm beside it: on PATH, in CUDA_HOME, or from PyPI (nvidia-cuda-cuobjdump)."""
    folders = [
        *(Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)),
        Path(os.environ.get("CUDA_HOME", "")) / "bin",
        *(folder for p in sys.path for folder in sorted((Path(p) / "nvidia").glob("*/bin"), reverse=True)),
    ]
    both = (f for f in folders if all(shutil.which(tool, path=str(f)) for tool in ("cuobjdump", "nvdisasm")))
    return next((folder / "cuobjdump" for folder in both), None)


def cuobjdump(library: Path, *options: str) -> str:
    tool = find_cuobjdump()
    assert tool is not None
    env = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([tool, *options, library], env=env, check=True, capture_output=True, text=True).stdout


def architectures(library: Path, kind: str) -> set[str]:
    """The architectures of which the library holds machine code (kind 'elf') or PTX ('ptx')."""
    return set(re.findall(r"\.(sm_\d+\w?)\.", cuobjdump(library, f"--list-{kind}")))


def instructions(library: Path, arch: str) -> dict[str, Counter[str]]:
    """The opcodes of each kernel for an architecture, with their suffixes, such as LDG.E.128, and how many of each."""
    return dict(opcodes(cuobjdump(library, "-sass", "-arch", arch)))


def opcodes(sass: str) -> Iterator[tuple[str, Counter[str]]]:
    """What `instructions` reads: each function's mangled name and its opcodes, guards and operands left out."""
    for function in sass.split("Function : ")[1:]:
        name, code = function.split("\n", 1)
        yield name.strip(), Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code))
