"""Can the compiled CUDA kernels run on a GPU, and if not, what is to be done?"""

from types import ModuleType
from typing import Any

import torch

# What the CUDA runtime says of a GPU that it will never serve. Any other error may pass: the launch reports it.
DRIVER_TOO_OLD = ("cudaErrorInsufficientDriver",)
NO_MACHINE_CODE = ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction", "cudaErrorInvalidKernelImage")
NO_PTX_COMPILER = (
    "cudaErrorUnsupportedPtxVersion",
    "cudaErrorJitCompilerNotFound",
    "cudaErrorJitCompilationDisabled",
)
# Major version of CUDA -> the oldest NVIDIA driver that runs its programs.
OLDEST_DRIVER = {12: "525.60.13", 13: "580.65.06"}


def why_not(native: ModuleType, build: dict[str, Any], index: int) -> str:
    """Why the extension's CUDA kernels do not serve GPU `index`, and what to do; '' if they do.

    Args:
        native: `mtlfast._C`.
        build: what the build wrote down.
        index: of the device, as torch counts.
    """
    if build["nvcc"] is None:
        return (
            f"this build of mtlfast holds no CUDA kernels, as {build['without_cuda']}: build it with nvcc 12.1 or newer"
        )
    if torch.version.hip is not None:
        return "mtlfast's kernels are for CUDA, and this torch is for ROCm"
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return ""  # no tensor lies there: a graph is traced for another machine
    error = native.cuda_error(index)
    if error in DRIVER_TOO_OLD:
        return _driver_too_old(native.cuda_facts())
    if error in NO_MACHINE_CODE or error in NO_PTX_COMPILER:
        return _no_code(build, index, error)
    return ""


def version_of(number: int) -> str:
    """A version of CUDA as its runtime counts, 12040, as it is written, 12.4."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_too_old(facts: dict[str, Any]) -> str:
    runtime, driver = facts["runtime"], facts["driver"]
    oldest = OLDEST_DRIVER.get(runtime // 1000, f"for CUDA {version_of(runtime)}")
    return (
        f"mtlfast's CUDA kernels were built with CUDA {version_of(runtime)}, and the NVIDIA driver serves CUDA "
        f"{version_of(driver)} at most: install driver {oldest} or newer, or build mtlfast with nvcc {driver // 1000}"
    )


def _no_code(build: dict[str, Any], index: int, error: str) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    gpu = f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}"
    built = f"mtlfast's CUDA kernels were built for {', '.join(build['cuda_archs'])}, and {gpu}"
    if major < 7:
        return f"{built}: they need 7.0 or newer"
    if error in NO_PTX_COMPILER:
        return (
            f"{built}, for which its driver cannot compile them ({error}): install a newer driver, or build mtlfast "
            f"with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    nvcc = " and nvcc 12, as nvcc 13 compiles for 7.5 and newer" if (major, minor) < (7, 5) else ""
    return f"{built}: build mtlfast with TORCH_CUDA_ARCH_LIST={major}.{minor}{nvcc}"
