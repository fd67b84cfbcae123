"""The measurements of the GPU kit: `measure.py NAME RESULT` writes RESULT, a JSON file, anew after every row.

Data are random; what a run reads, the runs before it have driven out of the second-level cache; outputs are poisoned
and checked before anything is timed.
"""

import itertools
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
from workloads import DTYPES, ELEMENTS, MODEL_DTYPE, MODEL_TASKS, MODELS, TASKS

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import PCGrad, Step
from mtlfast.bench import compiled, peers, solves
from mtlfast.bench.contests import contests_on
from mtlfast.bench.timing import take_turns
from mtlfast.bench.workload import scattered

DEVICE = "cuda"
COPIED = 2**28  # elements of the copy that gives the bandwidth
Row = dict[str, Any]
Run = Callable[[], object]


def device() -> Iterator[Row]:
    """The hardware and software of the run."""
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


def microseconds(contestants: Mapping[str, Run], rounds: int = 9) -> dict[str, dict[str, float]]:
    """The median and the quartiles of each contestant, which run in turn."""
    return {
        name: {"median": t.median * 1e6, "low": t.quartiles[0] * 1e6, "high": t.quartiles[1] * 1e6}
        for name, t in take_turns(contestants, rounds, warmups=2, device=DEVICE).items()
    }


def copy_bandwidth() -> float:
    """GB/s, read and written, of copying one 1 GiB tensor to another: what percentages refer to."""
    source, target = torch.randn(COPIED, device=DEVICE), torch.empty(COPIED, device=DEVICE)
    return 8 * COPIED / microseconds({"copy": lambda: target.copy_(source)})["copy"]["median"] / 1000


def bandwidth() -> Iterator[Row]:
    """Measures the bandwidth of a copy."""
    yield {"copy GB/s": copy_bandwidth()}


def spread(num_tasks: int, elements: int, dtype: torch.dtype) -> TaskGradients:
    """Task gradients of 150 tensors for each task."""
    return scattered(num_tasks, elements, dtype, DEVICE)


def matrix(num_tasks: int, elements: int, dtype: torch.dtype) -> TaskGradients:
    """Task gradients with as many elements in one tensor for each task."""
    return listed(num_tasks, [elements], dtype)


def listed(num_tasks: int, sizes: list[int], dtype: torch.dtype) -> TaskGradients:
    """Tensors of these sizes."""
    return TaskGradients.from_rows([[torch.randn(n, device=DEVICE).to(dtype) for n in sizes] for _ in range(num_tasks)])


def copies_beyond_cache(nbytes: int) -> int:
    """The number of copies of a workload that take turns, so that the second-level cache never holds the next one."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 2 * nbytes
    return 1 if nbytes > 8 * cache else 1 + -(-4 * cache // nbytes)


def rotating(runs: list[Run]) -> Run:
    """A function each of whose calls runs the next of these."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def rows_on(make: Callable[[], TaskGradients], label: Row, gigabytes_a_second: float, plain: bool) -> Iterator[Row]:
    """Each op on one workload: microseconds, % of copy bandwidth, how many times as long the plain way takes."""
    copies = [make()]
    J = copies[0].numel() * copies[0].num_tasks * copies[0].dtype.itemsize
    copies += [make() for _ in range(copies_beyond_cache(J) - 1)]
    check_outputs(copies[0])
    contests = [contests_on(grads) for grads in copies]
    for op, contest in contests[0].items():
        contestants = {"native": rotating([of_copy[op].native for of_copy in contests])}
        if plain:
            contestants["plain"] = rotating([of_copy[op].plain for of_copy in contests])
        times = microseconds(contestants)
        row = {**label, "op": op, **{f"us {name}": value for name, value in times["native"].items()}}
        row["% of copy"] = 100 * contest.passes * J / times["native"]["median"] / 1000 / gigabytes_a_second
        if plain:
            row["plain takes"] = times["plain"]["median"] / times["native"]["median"]
        yield row


def row_of(grads: TaskGradients, task: int) -> list[Tensor]:
    """One task's tensors."""
    return [g for g in grads.rows[task] if g is not None]


def check_outputs(grads: TaskGradients) -> None:
    """Checks that gram and combine write their results, into memory that held other numbers before."""
    first, last = row_of(grads, 0), row_of(grads, -1)
    products = [(a.double() * b.double()) for a, b in zip(first, last, strict=True)]
    poison = torch.full((grads.num_tasks, grads.num_tasks), torch.nan, dtype=torch.float64, device=DEVICE)
    del poison  # the allocator hands its memory to gram
    error = abs(ops.gram(grads)[0, -1] - sum(p.sum() for p in products))
    off = float(error / sum(p.abs().sum() for p in products))
    if not off < 1e-6:
        raise AssertionError(f"gram of the first and the last task is off by {off} of sum |a b|, expected 1e-6 at most")
    out: list[Tensor | None] = [torch.full_like(g, torch.nan) for g in first]
    weights = torch.zeros(grads.num_tasks, device=DEVICE)
    weights[-1] = 2
    ops.combine(grads, weights, out=out)
    if not all(torch.equal(x, 2 * g) for x, g in zip(out, last, strict=True) if x is not None):
        raise AssertionError("combine with a weight of 2 for the last task left something else than twice its gradient")


def all_ops() -> Iterator[Row]:
    """gram, combine and the rest: numbers of tasks, dtypes, scattered and whole."""
    gigabytes_a_second = copy_bandwidth()
    for name, K in itertools.product(DTYPES, TASKS):
        for layout, make in {"scattered": spread, "matrix": matrix}.items():
            label = {"K": K, "dtype": name, "layout": layout, "P": ELEMENTS}
            workload = partial(make, K, ELEMENTS, getattr(torch, name))
            yield from rows_on(workload, label, gigabytes_a_second, plain=K <= 16 and layout == "scattered")


def solvers() -> Iterator[Row]:
    """Every method's weights from a Gram matrix: the kernel alone."""
    for name, (make, *_) in solves.METHODS.items():
        for K in (8, 40):
            J = torch.randn(K, 2 * K, dtype=torch.float64, device=DEVICE)
            arguments = make().solve_arguments(J @ J.T, Step(K))
            times = microseconds({"solve": partial(ops.solve, *arguments)})["solve"]
            yield {"method": name, "K": K, **{f"us {key}": value for key, value in times.items()}}


def models() -> Iterator[Row]:
    """The ops on lists of tensors as models have them."""
    gigabytes_a_second = copy_bandwidth()
    for name, sizes in MODELS.items():
        label = {"model": name, "K": MODEL_TASKS, "dtype": MODEL_DTYPE, "tensors": len(sizes), "P": sum(sizes)}
        workload = partial(listed, MODEL_TASKS, sizes, getattr(torch, MODEL_DTYPE))
        yield from rows_on(workload, label, gigabytes_a_second, plain=True)


def step() -> Iterator[Row]:
    """A training step without a host sync, and the surgery alone, eager and as a captured graph."""
    trunk = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).to(DEVICE)
    heads = [nn.Linear(1024, 1).to(DEVICE) for _ in range(4)]
    x, aggregator = torch.randn(64, 1024, device=DEVICE), PCGrad()

    def losses() -> list[Tensor]:
        features = trunk(x)
        return [head(features).square().mean() for head in heads]

    def train() -> None:
        mtlfast.backward(losses(), aggregator, shared=trunk.parameters())

    def train_plainly() -> None:
        torch.stack(losses()).sum().backward()

    train()
    torch.cuda.set_sync_debug_mode("error")
    train()
    torch.cuda.set_sync_debug_mode("default")
    grads = spread(8, ELEMENTS, torch.float32)
    out: list[Tensor | None] = [torch.empty_like(g) for g in row_of(grads, 0)]

    def surgery() -> None:
        aggregator.aggregate(grads, Step(grads.num_tasks), out)

    surgery()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        surgery()
    floor = (2 * 8 + 1) * ELEMENTS * 4 / copy_bandwidth() / 1000
    ways = {"training step, PCGrad": train, "training step, summed losses": train_plainly}
    ways |= {"surgery, K = 8": surgery, "surgery, captured": graph.replay}
    for name, values in microseconds(ways).items():
        row = {"what": name, **{f"us {key}": value for key, value in values.items()}}
        yield {**row, "times the floor": values["median"] / floor} if name.startswith("surgery") else row


def per_parameter_mm(grads: TaskGradients) -> Tensor:
    """G as the sum of one small matrix product for each tensor."""
    columns = [torch.stack([g.reshape(-1) for g in grads.column(t) if g is not None]) for t in range(len(grads.shapes))]
    return torch.stack([J @ J.T for J in columns]).sum(0)


def rivals() -> Iterator[Row]:
    """gram against a loop of matrix products; PCGrad against TorchJD, where it is installed."""
    for K in (4, 8):
        grads = spread(K, ELEMENTS, torch.float32)
        times = microseconds({"mtlfast": partial(ops.gram, grads), "mm a parameter": partial(per_parameter_mm, grads)})
        yield {"what": "gram", "K": K, **{f"us {name}": value["median"] for name, value in times.items()}}
        if peers.installed():
            parameters = [[nn.Parameter(torch.zeros(s or (), device=DEVICE)) for s in grads.shapes] for _ in range(2)]
            jacobians = [torch.stack([g for g in grads.column(t) if g is not None]) for t in range(len(grads.shapes))]
            times = microseconds(
                {
                    "mtlfast": peers.surgery(grads.rows, parameters[0], PCGrad()),
                    "TorchJD, Gramian": peers.torchjd_surgery(jacobians, parameters[1], "PCGrad", optimize=True),
                    "TorchJD, default": peers.torchjd_surgery(jacobians, parameters[1], "PCGrad", optimize=False),
                },
                rounds=5,
            )
            yield {"what": "PCGrad", "K": K, **{f"us {name}": value["median"] for name, value in times.items()}}


def compiled_rivals() -> Iterator[Row]:
    """gram on flat tensors against the pairwise dot products as torch.compile fuses them."""
    for row in compiled.measure(ELEMENTS, rounds=9, tasks=tuple(K for K in TASKS if K <= 8), device=DEVICE).rows:
        yield {key: value[1] if isinstance(value, list) else value for key, value in row.items()}


MEASUREMENTS = {
    "device": device,
    "bandwidth": bandwidth,
    "ops": all_ops,
    "models": models,
    "step": step,
    "solvers": solvers,
    "peers": rivals,
    "compiled": compiled_rivals,
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
