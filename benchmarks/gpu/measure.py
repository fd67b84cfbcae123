"""The measurements of the GPU kit: `measure.py NAME RESULT` writes RESULT, a JSON file, anew after every row.

Data are random, working sets far beyond the second-level cache (100 MB a stream), outputs poisoned and checked.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import PCGrad
from mtlfast.bench import peers
from mtlfast.bench.contests import contests_on
from mtlfast.bench.timing import take_turns
from mtlfast.bench.workload import scattered

DEVICE = "cuda"
ELEMENTS = 25_000_000
COPIED = 2**28  # elements
TASKS = (2, 4, 8, 16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16)
Row = dict[str, Any]


def device() -> Iterator[Row]:
    """What all this ran on."""
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    yield {
        "gpu": properties.name,
        "processors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "second-level cache MiB": properties.L2_cache_size / 2**20,
        "driver": driver,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def microseconds(contestants: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, dict[str, float]]:
    """Of each contestant, in turn: median and quartiles."""
    return {
        name: {"median": t.median * 1e6, "low": t.quartiles[0] * 1e6, "high": t.quartiles[1] * 1e6}
        for name, t in take_turns(contestants, rounds, warmups=2, device=DEVICE).items()
    }


def copy_bandwidth() -> float:
    """GB/s, read and written, of copying one 1 GiB tensor to another: what percentages refer to."""
    source, target = torch.randn(COPIED, device=DEVICE), torch.empty(COPIED, device=DEVICE)
    return 8 * COPIED / microseconds({"copy": lambda: target.copy_(source)})["copy"]["median"] / 1000


def bandwidth() -> Iterator[Row]:
    """Of a copy."""
    yield {"copy GB/s": copy_bandwidth()}


def spread(num_tasks: int, elements: int, dtype: torch.dtype) -> TaskGradients:
    """150 tensors a task."""
    return scattered(num_tasks, elements, dtype, DEVICE)


def matrix(num_tasks: int, elements: int, dtype: torch.dtype) -> TaskGradients:
    """The same numbers in one tensor a task."""
    return TaskGradients.from_rows([[torch.randn(elements, device=DEVICE).to(dtype)] for _ in range(num_tasks)])


def rows_on(grads: TaskGradients, label: Row, gigabytes_a_second: float, plain: bool = True) -> Iterator[Row]:
    """Each op on one workload: microseconds, % of copy bandwidth, how many times as long the plain way takes."""
    J = grads.numel() * grads.num_tasks * grads.dtype.itemsize
    for op, contest in contests_on(grads).items():
        contestants = {"native": contest.native, **({"plain": contest.plain} if plain and op != "PCGrad" else {})}
        times = microseconds(contestants)
        row = {**label, "op": op, **{f"us {name}": value for name, value in times["native"].items()}}
        row["% of copy"] = 100 * contest.passes * J / times["native"]["median"] / 1000 / gigabytes_a_second
        if "plain" in times:
            row["plain takes"] = times["plain"]["median"] / times["native"]["median"]
        yield row


def check_written(grads: TaskGradients) -> None:
    """Poisons an output and looks at it after: a timing of a kernel that writes nothing is worth nothing."""
    out = [torch.full_like(g, torch.nan) for g in grads.rows[0] if g is not None]
    ops.combine(grads, torch.ones(grads.num_tasks, device=DEVICE), out=out)
    if not all(bool(x.isfinite().all()) for x in out):
        raise AssertionError("combine left elements unwritten")


def all_ops() -> Iterator[Row]:
    """gram, combine and the rest: numbers of tasks, dtypes, scattered and whole."""
    gigabytes_a_second = copy_bandwidth()
    for dtype in DTYPES:
        for K in TASKS:
            for layout, make in {"scattered": spread, "matrix": matrix}.items():
                elements = ELEMENTS if K <= 16 else ELEMENTS // 2
                grads = make(K, elements, dtype)
                check_written(grads)
                label = {"K": K, "dtype": str(dtype)[6:], "layout": layout, "P": elements}
                yield from rows_on(grads, label, gigabytes_a_second, plain=K <= 16)
                del grads


MODELS = {  # sizes of the shared parameters
    "ResNet-50": [64 * 3 * 49]
    + [s for s in (64, 128, 256, 512) for _ in range(8) for s in (s * s * 9, s * s * 4, s, s)],
    "ViT-B": [s for _ in range(12) for s in (768 * 2304, 2304, 768 * 768, 768, 768 * 3072, 3072, 3072 * 768, 768, 768)],
    "Llama block": [4096 * 4096] * 4 + [4096 * 11008] * 3 + [4096] * 2,
}


def models() -> Iterator[Row]:
    """The ops on lists of tensors as models have them."""
    gigabytes_a_second = copy_bandwidth()
    for name, sizes in MODELS.items():
        rows = [[torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for size in sizes] for _ in range(4)]
        label = {"model": name, "K": 4, "dtype": "bfloat16", "tensors": len(sizes), "P": sum(sizes)}
        yield from rows_on(TaskGradients.from_rows(rows), label, gigabytes_a_second)


def step() -> Iterator[Row]:
    """A training step without a host sync, and the surgery alone, eager and as a captured graph."""
    trunk = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).to(DEVICE)
    heads = [nn.Linear(1024, 1).to(DEVICE) for _ in range(4)]
    x, aggregator = torch.randn(64, 1024, device=DEVICE), PCGrad()

    def train() -> None:
        features = trunk(x)
        losses = [head(features).square().mean() for head in heads]
        mtlfast.backward(losses, aggregator, shared=trunk.parameters())

    train()
    torch.cuda.set_sync_debug_mode("error")
    train()
    torch.cuda.set_sync_debug_mode("default")
    grads = scattered(8, ELEMENTS, device=DEVICE)
    out: list[Tensor | None] = [torch.empty_like(g) for g in grads.rows[0] if g is not None]

    def surgery() -> None:
        weights, _ = aggregator.weigh(grads)
        ops.combine(grads, weights, out=out)

    surgery()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        surgery()
    times = microseconds({"training step": train, "surgery, K = 8": surgery, "surgery, captured": graph.replay})
    floor = (2 * 8 + 1) * ELEMENTS * 4 / copy_bandwidth() / 1000
    for name, values in times.items():
        row = {"what": name, **{f"us {key}": value for key, value in values.items()}}
        yield row if name == "training step" else {**row, "times the floor": values["median"] / floor}


def per_parameter_mm(grads: TaskGradients) -> Tensor:
    """G as a sum of one small matrix product a tensor."""
    columns = [torch.stack([g.reshape(-1) for g in grads.column(t) if g is not None]) for t in range(len(grads.shapes))]
    return torch.stack([J @ J.T for J in columns]).sum(0)


def rivals() -> Iterator[Row]:
    """gram against a loop of matrix products; PCGrad against TorchJD, where it is installed."""
    for K in (4, 8):
        grads = scattered(K, ELEMENTS, device=DEVICE)
        times = microseconds({"mtlfast": partial(ops.gram, grads), "mm a parameter": partial(per_parameter_mm, grads)})
        yield {"what": "gram", "K": K, **{f"us {name}": value["median"] for name, value in times.items()}}
        if peers.installed():
            parameters = [[nn.Parameter(torch.zeros(s or (), device=DEVICE)) for s in grads.shapes] for _ in range(2)]
            jacobians = [torch.stack([g for g in grads.column(t) if g is not None]) for t in range(len(grads.shapes))]
            times = microseconds(
                {
                    "mtlfast": peers.surgery(grads.rows, parameters[0]),
                    "TorchJD, Gramian": peers.torchjd_surgery(jacobians, parameters[1], optimize=True),
                    "TorchJD, default": peers.torchjd_surgery(jacobians, parameters[1], optimize=False),
                },
                rounds=5,
            )
            yield {"what": "PCGrad", "K": K, **{f"us {name}": value["median"] for name, value in times.items()}}


MEASUREMENTS = {
    "device": device,
    "bandwidth": bandwidth,
    "ops": all_ops,
    "models": models,
    "step": step,
    "peers": rivals,
}


def main() -> None:
    """Runs one measurement."""
    name, path = sys.argv[1], Path(sys.argv[2])
    rows: list[Row] = []
    for row in MEASUREMENTS[name]():
        rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
        path.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
