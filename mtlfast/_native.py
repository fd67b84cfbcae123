"""Loads the compiled extension, or knows the reason why it is not in use.

Importing mtlfast works without the extension. Every op then runs its plain-PyTorch reference, and the first call warns
once and gives the reason. With MTLFAST_REQUIRE_NATIVE=1 that call raises an error instead. The same holds for a GPU
that cannot run the extension's CUDA kernels.
"""

import functools
import importlib
import json
import os
import platform
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mtlfast import _gpu


def build_facts() -> dict[str, Any]:
    """What the build recorded (torch, Python, compilers, architectures, instruction sets, commit); {} without one."""
    path = Path(__file__).with_name("_build.json")
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return facts


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> tuple[ModuleType | None, str]:
    """The extension module and an empty string, or None and the reason why there is no extension."""
    facts = build_facts()
    built_for = facts.get("torch")
    if built_for is None:
        return None, "this copy of mtlfast was installed without its compiled extension"
    if _minor(built_for) != _minor(torch.__version__):
        return (
            None,
            f"mtlfast._C was built for torch {built_for}, this is torch {torch.__version__}: rebuild it",
        )
    python = platform.python_version()
    if _minor(facts.get("python", python)) != _minor(python):
        return None, f"mtlfast._C was built for Python {facts['python']}, this is Python {python}: rebuild it"
    try:
        return importlib.import_module("mtlfast._C"), ""
    except ImportError as error:
        return None, f"mtlfast._C does not load: {str(error).splitlines()[0]}"


C, REASON = _load()


@functools.cache
def _complain(reason: str) -> None:
    if os.environ.get("MTLFAST_REQUIRE_NATIVE", "0") not in ("", "0"):
        raise ImportError(f"MTLFAST_REQUIRE_NATIVE is set, but {reason}")
    warnings.warn(f"{reason}; mtlfast runs its plain-PyTorch reference instead", RuntimeWarning, stacklevel=4)


def module() -> ModuleType | None:
    """The extension. Without it the function returns None and, the first time, warns or raises with the reason."""
    if C is None and not torch.compiler.is_compiling():
        _complain(REASON)
    return C


@functools.cache
def why_not(device: torch.device) -> str:
    """Why compiled kernels do not serve tensors on `device`; '' if they do. On 'meta' the fake kernels do."""
    if C is None or device.type in ("cpu", "meta"):
        return REASON
    if device.type != "cuda":
        return f"mtlfast has no compiled kernels for {device.type}"
    return _gpu.why_not(C, build_facts(), device.index or 0)


def serves(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors on `device`. If not, the first call warns or raises with the reason."""
    if C is not None and device.type in ("cpu", "meta"):
        return True
    served: bool = _serves_after_asking(device)
    return served


# torch.compile calls this while it traces and takes the answer as a constant.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _serves_after_asking(device: torch.device) -> bool:
    reason = why_not(device)
    if reason:
        _complain(reason)
    return not reason
