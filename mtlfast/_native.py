"""Loads the compiled extension, or knows the reason why it is not in use.

Importing mtlfast works without the extension. Every op then runs its plain-PyTorch reference, and the first call warns
once and gives the reason. With MTLFAST_REQUIRE_NATIVE=1 that call raises an error instead.
"""

import functools
import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def build_facts() -> dict[str, Any]:
    """What the build recorded (torch, compilers, architectures, instruction sets, commit); {} if there was no build."""
    path = Path(__file__).with_name("_build.json")
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return facts


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> tuple[ModuleType | None, str]:
    """The extension module and an empty string, or None and the reason why there is no extension."""
    built_for = build_facts().get("torch")
    if built_for is None:
        return None, "this copy of mtlfast was installed without its compiled extension"
    if _minor(built_for) != _minor(torch.__version__):
        return (
            None,
            f"mtlfast._C was built for torch {built_for}, this is torch {torch.__version__}: rebuild it",
        )
    try:
        return importlib.import_module("mtlfast._C"), ""
    except ImportError as error:
        return None, f"mtlfast._C does not load: {str(error).splitlines()[0]}"


C, REASON = _load()


@functools.cache
def _complain() -> None:
    if os.environ.get("MTLFAST_REQUIRE_NATIVE", "0") not in ("", "0"):
        raise ImportError(f"MTLFAST_REQUIRE_NATIVE is set, but {REASON}")
    warnings.warn(f"{REASON}; mtlfast runs its plain-PyTorch reference instead", RuntimeWarning, stacklevel=4)


def module() -> ModuleType | None:
    """The extension. Without it the function returns None and, the first time, warns or raises with the reason."""
    if C is None and not torch.compiler.is_compiling():
        _complain()
    return C


@functools.cache
def _with_cuda() -> bool:
    return build_facts().get("nvcc") is not None


def serves(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors on `device`; on 'meta' the fake kernels do."""
    if C is None:
        return module() is not None
    return device.type in ("cpu", "meta") or (device.type == "cuda" and _with_cuda())
