"""The times of ops and solvers, beside the bandwidth of a copy, the plain-PyTorch way and peers.

Data are random; outputs are poisoned and checked before anything is timed.
"""

import itertools
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from timed import Row, copies_beyond_cache, copy_bandwidth, microseconds, rotating, spread
from torch import Tensor, nn
from workloads import DTYPES, MODEL_DTYPE, MODEL_TASKS, Setting

from mtlfast import TaskGradients, ops
from mtlfast.aggregation import PCGrad, Step
from mtlfast.bench import compiled, peers, solves
from mtlfast.bench.contests import PASSES, accumulating, contests_on
from mtlfast.bench.workload import scattered

# The loop by hand over each tensor reads a number on the host for each pair of tasks: with thousands of tensors or many
# tasks it would take the time of all other rows.
PLAIN = [op for op in PASSES if op != "PCGrad by tensor"]


def listed(setting: Setting, num_tasks: int, sizes: list[int], dtype: torch.dtype) -> TaskGradients:
    """Tensors of these sizes."""
    rows = [[torch.randn(n, device=setting.device).to(dtype) for n in sizes] for _ in range(num_tasks)]
    return TaskGradients.from_rows(rows)


def rows_on(
    setting: Setting,
    make: Callable[[], TaskGradients],
    label: Row,
    gigabytes_a_second: float,
    plain: Collection[str] = (),
    only: Collection[str] = (*PASSES, "combine, accumulate"),
) -> Iterator[Row]:
    """Each op on one workload: microseconds, % of copy bandwidth, how many times as long the plain way takes.

    Args:
        setting: where they run.
        make: makes the workload anew.
        label: the first cells of each row.
        gigabytes_a_second: the bandwidth of a copy.
        plain: the ops whose plain way is timed, too.
        only: the ops that are timed.
    """
    copies = [make()]
    J = copies[0].numel() * copies[0].num_tasks * copies[0].dtype.itemsize
    copies += [make() for _ in range(copies_beyond_cache(setting, J) - 1)]
    check_outputs(copies[0])
    contests = [contests_on(grads) | accumulating(grads) for grads in copies]
    for op in only:
        contest = contests[0][op]
        contestants = {"native": rotating([of_copy[op].native for of_copy in contests])}
        if op in plain and contest.plain is not contest.native:
            contestants["plain"] = rotating([of_copy[op].plain for of_copy in contests])
        times = microseconds(setting, contestants)
        row = {**label, "op": op, **{f"us {name}": value for name, value in times["native"].items()}}
        row["% of copy"] = 100 * contest.passes * J / times["native"]["median"] / 1000 / gigabytes_a_second
        if "plain" in times:
            row["plain takes"] = times["plain"]["median"] / times["native"]["median"]
        yield row


def check_outputs(grads: TaskGradients) -> None:
    """Poisons memory and looks at what gram and combine leave there: to write nothing would be fast."""
    first, last = ([g for g in grads.rows[task] if g is not None] for task in (0, -1))
    products = [(a.double() * b.double()) for a, b in zip(first, last, strict=True)]
    poison = torch.full((grads.num_tasks, grads.num_tasks), torch.nan, dtype=torch.float64, device=grads.device)
    del poison  # the allocator hands its memory to gram
    error = abs(ops.gram(grads)[0, -1] - sum(p.sum() for p in products))
    off = float(error / sum(p.abs().sum() for p in products))
    if not off < 1e-6:
        raise AssertionError(f"gram of the first and the last task is off by {off} of sum |a b|, expected 1e-6 at most")
    out: list[Tensor | None] = [torch.full_like(g, torch.nan) for g in first]
    weights = torch.zeros(grads.num_tasks, device=grads.device)
    weights[-1] = 2
    ops.combine(grads, weights, out=out)
    if not all(torch.equal(x, 2 * g) for x, g in zip(out, last, strict=True) if x is not None):
        raise AssertionError("combine with a weight of 2 for the last task left something else than twice its gradient")


def first_sizes(setting: Setting) -> Iterator[Row]:
    """gram, combine and a PCGrad surgery, on few workloads that differ much."""
    gigabytes_a_second = copy_bandwidth(setting)
    for K, name, elements in setting.sizes:
        label = {"K": K, "dtype": name, "layout": "scattered", "P": elements}
        workload = partial(spread, setting, K, elements, getattr(torch, name))
        yield from rows_on(setting, workload, label, gigabytes_a_second, only=("gram", "combine", "PCGrad"))


def all_ops(setting: Setting) -> Iterator[Row]:
    """Every op: many tensors, then numbers of tasks and dtypes, scattered and whole."""
    gigabytes_a_second = copy_bandwidth(setting)
    label = {"K": 8, "dtype": "float32", "layout": f"{setting.many} tensors", "P": setting.elements}
    many = partial(scattered, 8, setting.elements, torch.float32, setting.device, setting.many)
    yield from rows_on(setting, many, label, gigabytes_a_second, plain=PLAIN)
    for name, K in itertools.product(DTYPES, setting.tasks):
        dtype = getattr(torch, name)
        layouts = {
            "scattered": partial(spread, setting, K, setting.elements, dtype),
            "matrix": partial(listed, setting, K, [setting.elements], dtype),
        }
        for layout, make in layouts.items():
            label = {"K": K, "dtype": name, "layout": layout, "P": setting.elements}
            plain = PLAIN if K <= 16 and layout == "scattered" else ()
            yield from rows_on(setting, make, label, gigabytes_a_second, plain)


def models(setting: Setting) -> Iterator[Row]:
    """The ops on lists of tensors as models have them."""
    gigabytes_a_second = copy_bandwidth(setting)
    for name, sizes in setting.models.items():
        label = {"model": name, "K": MODEL_TASKS, "dtype": MODEL_DTYPE, "tensors": len(sizes), "P": sum(sizes)}
        make = partial(listed, setting, MODEL_TASKS, sizes, getattr(torch, MODEL_DTYPE))
        yield from rows_on(setting, make, label, gigabytes_a_second, plain=PASSES)


def solvers(setting: Setting) -> Iterator[Row]:
    """Every method's weights from a Gram matrix: the kernel alone, all methods before more tasks."""
    for K, name in [(n, method) for n in setting.solves for method in solves.methods_for(n)]:
        make = solves.METHODS[name][0]
        J = torch.randn(K, 2 * K, dtype=torch.float64, device=setting.device)
        arguments = make().solve_arguments(J @ J.T, Step(K))
        run = partial(ops.solve, *arguments)
        times = microseconds(setting, {"solve": run}, rounds=9 if K < 100 else 3)["solve"]
        yield {"method": name, "K": K, **{f"us {key}": value for key, value in times.items()}}


def per_parameter_mm(grads: TaskGradients) -> Tensor:
    """G as a sum of one small matrix product a tensor."""
    columns = [torch.stack([g.reshape(-1) for g in grads.column(t) if g is not None]) for t in range(len(grads.shapes))]
    return torch.stack([J @ J.T for J in columns]).sum(0)


def rivals(setting: Setting) -> Iterator[Row]:
    """gram against a loop of matrix products; PCGrad against TorchJD, where it is installed."""
    for K in (4, 8):
        grads = spread(setting, K, setting.elements, torch.float32)
        ways = {"mtlfast": partial(ops.gram, grads), "mm a parameter": partial(per_parameter_mm, grads)}
        times = microseconds(setting, ways)
        yield {"what": "gram", "K": K, **{f"us {name}": value["median"] for name, value in times.items()}}
        if peers.installed():
            parameters = [
                [nn.Parameter(torch.zeros(s or (), device=setting.device)) for s in grads.shapes] for _ in range(2)
            ]
            jacobians = [torch.stack([g for g in grads.column(t) if g is not None]) for t in range(len(grads.shapes))]
            times = microseconds(
                setting,
                {
                    "mtlfast": peers.surgery(grads.rows, parameters[0], PCGrad()),
                    "TorchJD, Gramian": peers.torchjd_surgery(jacobians, parameters[1], "PCGrad", optimize=True),
                    "TorchJD, default": peers.torchjd_surgery(jacobians, parameters[1], "PCGrad", optimize=False),
                },
                rounds=5,
            )
            yield {"what": "PCGrad", "K": K, **{f"us {name}": value["median"] for name, value in times.items()}}


def compiled_rivals(setting: Setting) -> Iterator[Row]:
    """gram on flat tensors against the pairwise dot products as torch.compile fuses them."""
    tasks = tuple(K for K in setting.tasks if K <= 8)
    for row in compiled.measure(setting.elements, rounds=9, tasks=tasks, device=setting.device).rows:
        yield {key: value[1] if isinstance(value, list) else value for key, value in row.items()}
