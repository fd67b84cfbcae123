"""Makes sure that the compiled extension is there: one that was carried here if it fits, else it is compiled.

`extension.py RESULT` takes mtlfast/_C*.so with the mtlfast/_build.json beside it, or the two from a folder below
build/carry*. It imports nothing of mtlfast: what it replaces must not be in use.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from records import record

CHECKOUT = Path(__file__).resolve().parents[2]
LOADS = "from mtlfast import _native; import sys; sys.exit(_native.REASON or 0)"


def minor(version: str) -> list[str]:
    """2.11.0+cu130 -> 2, 11."""
    return version.split("+")[0].split(".")[:2]


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Is there machine code of this major version, or PTX, for no newer a GPU?"""
    for arch in archs:
        wanted = tuple(map(int, arch.removesuffix("+PTX").split(".")))
        if wanted <= capability and (wanted[0] == capability[0] or arch.endswith("+PTX")):
            return True
    return False


def misfit(folder: Path, capability: tuple[int, int] | None) -> str:
    """Why the extension in this folder does not serve this Python, torch and GPU (None: the CPU); '' if it does."""
    try:
        facts: dict[str, Any] = json.loads((folder / "_build.json").read_text())
    except (OSError, ValueError):
        return "has no _build.json"
    if not (folder / library()).exists():
        return f"has no {library()}"
    if minor(facts["torch"]) != minor(torch.__version__):
        return f"is for torch {facts['torch']}, this is {torch.__version__}"
    if capability is not None and not runs_on(facts["cuda_archs"], capability):
        return f"is for {', '.join(facts['cuda_archs']) or 'no GPU'}, this GPU is {capability[0]}.{capability[1]}"
    return ""


def library() -> str:
    """The extension's name under this Python."""
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(package: Path) -> str:
    """Why the extension does not load; '' if it does."""
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-c", LOADS]
    run = subprocess.run(command, cwd=package.parent, env=env, capture_output=True, text=True)
    return run.stderr.strip()[-300:] if run.returncode else ""


def provide(checkout: Path, capability: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    """A row for each folder that was looked at, and one for the extension that serves now."""
    package = checkout / "mtlfast"
    folders = [path.parent for path in sorted(checkout.glob("build/carry*/**/_build.json"))]
    for folder in [package, *folders]:
        name, why = folder.relative_to(checkout).as_posix(), misfit(folder, capability)
        if not why and folder != package:
            for file in (library(), "_build.json"):
                shutil.copy(folder / file, package / file)
        why = why or load(package)
        if not why:
            yield served(f"carried in {name}", package)
            return
        yield {"extension": f"not from {name}", "why": why}
    if capability is None:
        raise RuntimeError("no extension fits, and without a GPU none is compiled here")
    env = {**os.environ, "MTLFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{capability[0]}.{capability[1]}"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=checkout, env=env, check=True)
    if why := load(package):
        raise RuntimeError(f"the compiled extension does not load: {why}")
    yield served("compiled", package)


def served(how: str, package: Path) -> dict[str, Any]:
    """What serves, as its build wrote down."""
    facts = json.loads((package / "_build.json").read_text())
    archs = ", ".join(facts["cuda_archs"])
    return {"extension": how, "torch": facts["torch"], "architectures": archs, "commit": facts.get("commit", "unknown")}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--dry", action="store_true", help="for the CPU, compiling nothing")
    arguments = parser.parse_args()
    record(provide(CHECKOUT, None if arguments.dry else torch.cuda.get_device_capability()), arguments.result)


if __name__ == "__main__":
    main()
