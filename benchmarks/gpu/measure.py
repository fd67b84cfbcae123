"""The measurements of the GPU kit: `measure.py NAME RESULT` writes RESULT, a JSON file, anew after every row."""

import argparse
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import op_times
import profiles
import ranks
import smoke
import torch
import training
from records import record
from timed import Row, copy_bandwidth
from workloads import DRY, GPU, Setting


def output_of(*command: str) -> str:
    """Standard output of a command, or 'unknown' if it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device(setting: Setting) -> Iterator[Row]:
    """What all this ran on."""
    software = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "commit": output_of("git", "describe", "--always", "--dirty"),
    }
    if setting.device != "cuda":
        yield {"gpu": "none: a dry run", **software}
        return
    properties = torch.cuda.get_device_properties(0)
    yield {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "second-level cache MiB": properties.L2_cache_size / 2**20,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **software,
    }


def bandwidth(setting: Setting) -> Iterator[Row]:
    """Of a copy."""
    yield {"copy GB/s": copy_bandwidth(setting)}


MEASUREMENTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "device": device,
    "bandwidth": bandwidth,
    "smoke": smoke.smoke,
    "sizes": op_times.first_sizes,
    "step": training.step,
    "capture": training.capture_cold,
    "solvers": op_times.solvers,
    "profiles": profiles.profiles,
    "fallback": smoke.fallback,
    "ranks": ranks.ranks,
    "ops": op_times.all_ops,
    "models": op_times.models,
    "peers": op_times.rivals,
    "compiled": op_times.compiled_rivals,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("result", type=Path)
    parser.add_argument("--dry", action="store_true", help="on the CPU, on little data")
    arguments = parser.parse_args()
    record(MEASUREMENTS[arguments.name](DRY if arguments.dry else GPU), arguments.result)


if __name__ == "__main__":
    main()
