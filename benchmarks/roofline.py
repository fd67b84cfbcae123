"""Predicts the time of the CUDA kernels from bytes, multiply-adds, occupancy and csrc/cuda/registers.json.

    python benchmarks/roofline.py [--chip H100] [--results benchmarks/results/FOLDER/results.json]

prints one row for each op and workload of the GPU kit (gpu/workloads.py). All of it is arithmetic, so all of it is
predicted; with the results of a GPU run beside it, the last column says how far off it was.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.report import table as markdown
from gpu.workloads import DTYPES, ELEMENTS, MODEL_DTYPE, MODEL_TASKS, MODELS, TASKS

from mtlfast.bench.contests import PASSES
from mtlfast.ops._precision import EXACT_TASKS

REGISTERS = Path(__file__).parents[1] / "csrc" / "cuda" / "registers.json"
LATENCY = 700e-9  # seconds of a load from memory under load
LAUNCH = 5e-6  # seconds of a launch with its 32 KiB argument, and of the sums' second stage
THREAD_BYTES = 16 * 256  # what the threads of a block load at once, a row
CXX_NAMES = {"float32": "float", "bfloat16": "__nv_bfloat16"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Chip:
    """A GPU's published figures. `reached` is the share of the memory's peak that a copy reaches."""

    arch: str
    processors: int
    gigahertz: float
    gigabytes_a_second: float
    lanes: int  # float multiply-adds a processor does in a cycle
    reached: float = 0.9

    @property
    def bandwidth(self) -> float:
        """The bandwidth of a copy, in bytes a second."""
        return self.gigabytes_a_second * 1e9 * self.reached


CHIPS = {
    "A100": Chip("sm_80", 108, 1.41, 2039, 64),
    "H100": Chip("sm_90", 132, 1.75, 3350, 128),
    "B200": Chip("sm_100", 148, 1.85, 8000, 128),
}


@dataclass(frozen=True)
class Workload:
    """K tasks, P elements each; `label` says which of the kit's rows it is."""

    num_tasks: int
    dtype: str
    elements: int
    label: Row


@dataclass(frozen=True)
class Launch:
    """What one kernel does: its name in registers.json, and what bounds it."""

    kernel: str
    bytes_moved: float
    multiply_adds: float  # of a column
    block_bytes: float  # that a block has in flight


def converted(elements: int, chip: Chip) -> float:
    """So many multiply-adds of floats take the time of converting elements to or from double, 16 a cycle."""
    return elements * chip.lanes / 16


def gram(work: Workload, bytes_moved: float, chip: Chip, kernels: dict[str, Any], split: int = 0) -> Launch:
    """The Gram kernel for K tasks: all sums in registers, or rows staged in shared memory.

    The sums of few tasks are exact: a multiply-add of doubles takes twice the time of one of floats. With a split the
    products are those of the tasks before it with the others.
    """
    K, dtype, of_16_bits = work.num_tasks, CXX_NAMES[work.dtype], work.dtype != "float32"
    if K <= 16:
        exact = max(split, K - split) <= EXACT_TASKS
        name = f"gram_kernel<{dtype}, {{}}, {'double' if exact else 'float'}>"
        rows = next(rows for rows in range(K, 17) if name.format(rows) in kernels)
        multiply_adds = rows * (rows + 1) / 2 * (2 if exact else 1) + (rows if of_16_bits else 0)
        multiply_adds += converted(rows, chip) if exact else 0
        return Launch(name.format(rows), bytes_moved, multiply_adds, THREAD_BYTES * K)
    classes, other_classes = -(-split // 4), -(-(K - split) // 4)
    capacity = next(rows for rows in (32, 64, 128) if (2 * max(split, K - split) if split else K) <= rows)
    tiles = classes * other_classes if split else other_classes * (other_classes + 1) / 2
    # A tile takes 16 multiply-adds a column and, for each group of 16 bytes, 8 loads from shared memory, which take a
    # warp 4 cycles each at worst; 16-bit elements are converted besides.
    loads = 8 * 4 * chip.lanes / 32 / (16 / DTYPES[work.dtype])
    slots = max(16 + (8 if of_16_bits else 0), loads)
    return Launch(f"gram_staged_kernel<{dtype}, {capacity}, float>", bytes_moved, tiles * slots, 16384 / capacity * K)


def launches(op: str, work: Workload, chip: Chip, kernels: dict[str, Any]) -> list[Launch]:
    """The kernels that an op launches, without the two kernels on K x K numbers of a surgery.

    Groups, of which PCGrad by tensor makes one a tensor, add neither bytes nor launches.
    """
    dtype, K = CXX_NAMES[work.dtype], work.num_tasks
    if op.startswith("PCGrad"):
        return launches("gram", work, chip, kernels) + launches("combine", work, chip, kernels)
    of_J, of_direction = PASSES[op]
    bytes_moved = (of_J * K + of_direction) * work.elements * DTYPES[work.dtype]
    if op in ("gram", "cross-Gram"):
        return [gram(work, bytes_moved, chip, kernels, split=K // 2 if op == "cross-Gram" else 0)]
    if op.startswith("combine"):
        multiply_adds = 2 * K + converted(K + 1, chip) + (K if work.dtype != "float32" else 0)
        return [Launch(f"combine_kernel<{dtype}, {dtype}, 1>", bytes_moved, multiply_adds, THREAD_BYTES * min(K, 4))]
    if op == "advance_":
        multiply_adds = 2 * 4 * K + converted(3 * K + 1, chip)
        return [Launch(f"advance_kernel<{dtype}, {dtype}>", bytes_moved, multiply_adds, THREAD_BYTES * min(2 * K, 4))]
    if op == "excess_risks":  # a square root and a division of doubles take about as long as 16 of their multiply-adds
        multiply_adds = 2 * (16 + 4) * K + converted(2 * K, chip)
        return [Launch(f"excess_risks_kernel<{dtype}, {dtype}>", bytes_moved, multiply_adds, THREAD_BYTES * 2)]
    if op in ("grad_drop", "trimmed_mean"):
        # Sums in double of two parts of each element, and Philox; or a network of comparisons, each of two operations.
        widths = {"grad_drop": 3 * K + converted(2 * K + 1, chip) + 20, "trimmed_mean": 2 * 19 * max(1, K / 8) ** 1.6}
        rows = next((rows for rows in (4, 8, 16, 32, 64) if rows >= K), None)
        kernel = f"grad_drop_kernel<{dtype}, false>" if op == "grad_drop" else f"trimmed_mean_kernel<{dtype}, {rows}>"
        return [Launch(kernel, bytes_moved, widths[op], THREAD_BYTES * min(K, 4))]
    kernel = {"norms": "norms_kernel<{0}>", "flatten": "flatten_kernel<{0}, {0}>", "scale_": "scale_kernel<{0}>"}[op]
    return [Launch(kernel.format(dtype), bytes_moved, K, THREAD_BYTES)]


def predict(op: str, work: Workload, chip: Chip, kernels: dict[str, Any]) -> Row:
    """One row of the table: what limits the op, and the predicted time."""
    seconds = memory_seconds = compute_seconds = total_bytes = 0.0
    parts, in_flight = launches(op, work, chip, kernels), []
    needed = chip.bandwidth / chip.processors * LATENCY
    for part in parts:
        in_flight.append(kernels[part.kernel]["blocks"] * part.block_bytes)
        memory = part.bytes_moved / chip.bandwidth * max(1.0, needed / in_flight[-1])
        compute = part.multiply_adds * work.elements / (chip.lanes * chip.processors * chip.gigahertz * 1e9)
        seconds += max(memory, compute) + LAUNCH
        memory_seconds, compute_seconds = memory_seconds + memory, compute_seconds + compute
        total_bytes += part.bytes_moved
    if op.startswith("PCGrad"):
        seconds += 2 * LAUNCH  # random keys and the solver
    return {
        **work.label,
        "op": op,
        "kernel": " + ".join(part.kernel.replace("__nv_", "") for part in parts),
        "registers": max(kernels[part.kernel]["registers"] for part in parts),
        "blocks": min(kernels[part.kernel]["blocks"] for part in parts),
        "KiB in flight": round(min(in_flight) / 1024),
        "KiB needed": round(needed / 1024),
        "us memory": round(memory_seconds * 1e6),
        "us compute": round(compute_seconds * 1e6),
        "us predicted": round(seconds * 1e6),
        "% of copy": round(100 * total_bytes / chip.bandwidth / seconds),
    }


def workloads() -> Iterator[Workload]:
    """The kit's workloads without the matrices, which take as long as scattered tensors."""
    for dtype in DTYPES:
        for K in TASKS:
            label = {"K": K, "dtype": dtype, "model": "", "P": ELEMENTS}
            yield Workload(K, dtype, ELEMENTS, label)
    for model, sizes in MODELS.items():
        label = {"K": MODEL_TASKS, "dtype": MODEL_DTYPE, "model": model, "P": sum(sizes)}
        yield Workload(MODEL_TASKS, MODEL_DTYPE, sum(sizes), label)


def table(chip_name: str, nvcc: str = "13.0") -> list[Row]:
    """All rows for one GPU."""
    chip = CHIPS[chip_name]
    kernels = json.loads(REGISTERS.read_text())[nvcc][chip.arch]
    return [predict(op, work, chip, kernels) for work in workloads() for op in PASSES]


def compare(rows: list[Row], results: Row) -> None:
    """Adds what a run of the GPU kit measured on the same workload, and predicted over measured."""
    measured = [
        row
        for step in results["steps"]
        if step["name"] in ("sizes", "ops", "models")
        for row in step["result"] or []
        if row.get("layout", "scattered") == "scattered"
    ]
    found = {workload_of(row): row["us median"] for row in measured}
    for row in rows:
        us = found.get(workload_of(row))
        row["us measured"] = us if us is not None else ""
        row["predicted / measured"] = round(row["us predicted"] / us, 2) if us else ""


def workload_of(row: Row) -> tuple[Any, ...]:
    """The key by which predicted and measured rows are matched."""
    return (row.get("model", ""), *(row[key] for key in ("op", "K", "dtype", "P")))


def main() -> None:
    """Runs the command line."""
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
