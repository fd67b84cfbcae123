"""What the CUDA kernels should take: bytes, multiply-adds, occupancy, bytes in flight, from csrc/cuda/registers.json.

    python benchmarks/roofline.py [--chip H100] [--results benchmarks/results/FOLDER/results.json]

prints one row for each op, number of tasks and dtype at P = 25M. All of it is arithmetic, so all of it is predicted;
with the results of a GPU run beside it, the last column says how far off it was.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.report import table as markdown

REGISTERS = Path(__file__).parents[1] / "csrc" / "cuda" / "registers.json"
ELEMENTS = 25_000_000
TASKS = (2, 4, 8, 16, 32, 64)
LATENCY = 700e-9  # seconds of a load from memory under load
LAUNCH = 5e-6  # seconds of a launch with its 32 KiB argument, and of the sums' second stage


@dataclass(frozen=True)
class Chip:
    """A GPU's published figures; `reached`: the share of the memory's peak that a copy reaches."""

    arch: str
    processors: int
    gigahertz: float
    gigabytes_a_second: float
    lanes: int  # float multiply-adds a processor does in a cycle
    reached: float = 0.9


CHIPS = {
    "A100": Chip("sm_80", 108, 1.41, 2039, 64),
    "H100": Chip("sm_90", 132, 1.75, 3350, 128),
    "B200": Chip("sm_100", 148, 1.85, 8000, 128),
}
ITEM = {"float": 4, "__nv_bfloat16": 2}


def gram_kernel(K: int, dtype: str, lanes: int, kernels: dict[str, Any]) -> tuple[str, float, float]:
    """The kernel that K tasks take, its multiply-adds a column, and its bytes of loads in flight a block."""
    if K <= 16:
        rows = next(rows for rows in range(K, 17) if f"gram_kernel<{dtype}, {rows}>" in kernels)
        converted = 0 if dtype == "float" else rows
        return f"gram_kernel<{dtype}, {rows}>", rows * (rows + 1) / 2 + converted, 256 * 16 * K
    capacity, classes = (32 if K <= 32 else 64), -(-K // 4)
    tiles = classes * (classes + 1) / 2
    # A tile takes 16 multiply-adds a column and, for each group of 16 bytes, 8 loads from shared memory, which take a
    # warp 4 cycles each at worst; 16-bit elements are converted besides.
    loads = 8 * 4 * lanes / 32 / (16 / ITEM[dtype])
    slots = max(16 + (0 if dtype == "float" else 8), loads)
    return f"gram_staged_kernel<{dtype}, {capacity}>", tiles * slots, 16384 / capacity * K


def predict(chip: Chip, op: str, K: int, dtype: str, kernels: dict[str, dict[str, int]]) -> dict[str, Any]:
    """One row: what bounds the kernel, and the time that follows."""
    item = ITEM[dtype]
    if op == "gram":
        kernel, multiply_adds, block_bytes = gram_kernel(K, dtype, chip.lanes, kernels)
        bytes_moved = K * ELEMENTS * item
    else:
        kernel, multiply_adds, block_bytes = f"combine_kernel<{dtype}, {dtype}, 1>", K * 2.0, 256 * 16 * min(K, 4)
        bytes_moved = (K + 1) * ELEMENTS * item
    facts = kernels[kernel]
    bandwidth = chip.gigabytes_a_second * 1e9 * chip.reached
    in_flight = facts["blocks"] * block_bytes
    needed = bandwidth / chip.processors * LATENCY
    memory = bytes_moved / bandwidth * max(1.0, needed / in_flight)
    compute = multiply_adds * ELEMENTS / (chip.lanes * chip.processors * chip.gigahertz * 1e9)
    seconds = max(memory, compute) + LAUNCH
    return {
        "op": op,
        "K": K,
        "dtype": "float32" if dtype == "float" else "bfloat16",
        "kernel": kernel.replace("__nv_", ""),
        "registers": facts["registers"],
        "blocks": facts["blocks"],
        "KiB in flight": round(in_flight / 1024),
        "KiB needed": round(needed / 1024),
        "us memory": round(memory * 1e6),
        "us compute": round(compute * 1e6),
        "us predicted": round(seconds * 1e6),
        "% of copy": round(100 * bytes_moved / bandwidth / seconds),
    }


def table(chip_name: str, nvcc: str = "13.0") -> list[dict[str, Any]]:
    """All rows of a chip."""
    chip = CHIPS[chip_name]
    kernels = json.loads(REGISTERS.read_text())[nvcc][chip.arch]
    cases = [(op, K, dtype) for op in ("gram", "combine") for dtype in ITEM for K in TASKS]
    return [predict(chip, op, K, dtype, kernels) for op, K, dtype in cases]


def compare(rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Adds what a run of the GPU kit measured on scattered tensors of the same size, and predicted over measured."""
    measured = next((step["result"] for step in results["steps"] if step["name"] == "ops"), None) or []
    found = {
        (row["op"], row["K"], row["dtype"]): row["us median"]
        for row in measured
        if row["layout"] == "scattered" and row["P"] == ELEMENTS
    }
    for row in rows:
        us = found.get((row["op"], row["K"], row["dtype"]))
        row["us measured"] = us if us is not None else ""
        row["predicted / measured"] = round(row["us predicted"] / us, 2) if us else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, default="H100")
    parser.add_argument("--results", type=Path, help="results.json of a GPU run")
    arguments = parser.parse_args()
    rows = table(arguments.chip)
    if arguments.results:
        compare(rows, json.loads(arguments.results.read_text()))
    print(markdown(rows))


if __name__ == "__main__":
    main()
