"""Every op once against float64: numbers of tasks, dtypes, alignments, both precisions of sums.

A figure is the largest error over what is allowed, so it is 1 at most; the truth is the reference's on the CPU, in
float64. What fails is recorded in its place, and the rest still runs.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from unittest.mock import patch

import torch
from timed import Row
from torch import Tensor
from workloads import Setting

from mtlfast import TaskGradients, _native, ops, reference
from mtlfast.aggregation import Step
from mtlfast.bench import solves
from mtlfast.bench.workload import scattered
from mtlfast.ops._precision import sum_rtol

TASKS = (2, 8, 16, 33, 70)  # sums in registers, few and as many as fit; rows staged; more rows than are staged at once
DTYPES = (torch.float32, torch.bfloat16)
FEW = 12  # tensors: one launch
SOLVE_RTOL = (
    1e-6  # of the largest weight: GPU and CPU compile one source, but fuse multiplications and sums differently
)

Checks = Mapping[str, Callable[[], float]]


def who_serves(device: str) -> Row:
    """Do the compiled kernels serve the device, does the reference, and why; or does neither?"""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            kernels = _native.serves(torch.device(device))
            ops.norms(scattered(2, 100, device=device, num_tensors=2)).tolist()  # no fitting machine code shows here
        except (ImportError, RuntimeError) as error:
            return {"served by": "neither", "why": str(error).splitlines()[0]}
    return {"served by": "kernels" if kernels else "reference", "why": "; ".join(str(w.message) for w in seen)}


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, one element behind an aligned address."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def as_it_is(tensor: Tensor) -> Tensor:
    """Where torch allocated it: aligned."""
    return tensor


LAYOUTS = {"aligned": as_it_is, "misaligned": shifted}


def joined(tensors: list[Tensor | None]) -> Tensor:
    """Flat tensors as one vector, or [R, *] as one matrix: float64 on the CPU."""
    return torch.cat([x.cpu().double() for x in tensors if x is not None], dim=-1)


def worst(error: Tensor, allowed: Tensor) -> float:
    """The largest share of what is allowed."""
    return float((error.abs() / allowed).max())


def partition(num_tensors: int) -> list[int]:
    """Groups of all kinds: one of tensors that do not lie together, some of one tensor each, some of none."""
    return [t if t % 2 else 0 for t in range(num_tensors)]


def check_ops(grads: TaskGradients, place: Callable[[Tensor], Tensor]) -> Checks:
    """Each op's largest error on these gradients, over what is allowed.

    Args:
        grads: flat tensors.
        place: puts an output, which is poisoned first, at an aligned address or beside one.
    """
    K, T, dtype, device = grads.num_tasks, len(grads.shapes), grads.dtype, grads.device
    J = reference.flatten(grads, torch.float64).cpu()
    truth, size = reference.gram(TaskGradients.from_matrix(J)), J.abs() @ J.abs().T
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    weights, coefficients = torch.randn(K, device=device), torch.randn(3, K, device=device)
    groups, elements = partition(T), [0 if shape is None else shape.numel() for shape in grads.shapes]

    def of_groups(J: Tensor) -> Tensor:
        """[T, K, K], the Gram matrix of each group, of which there are as many as tensors."""
        of_tensors = torch.stack([columns @ columns.T for columns in J.split(elements, dim=1)])
        return torch.zeros_like(of_tensors).index_add_(0, torch.tensor(groups), of_tensors)

    def gram(precision: str) -> float:
        poison = torch.full((K, K), torch.nan, dtype=torch.float64, device=device)
        del poison  # the allocator hands its memory to gram
        error = ops.gram(grads, precision=precision).cpu() - truth
        return worst(error, size * sum_rtol(dtype, precision == "exact"))

    def gram_of_groups(precision: str) -> float:
        poison = torch.full((T, K, K), torch.nan, dtype=torch.float64, device=device)
        del poison
        error = ops.gram(grads, precision=precision, groups=groups, num_groups=T).cpu() - of_groups(J)
        return worst(error, of_groups(J.abs()) * sum_rtol(dtype, precision == "exact") + tiny)

    def cross_gram() -> float:
        batches = [TaskGradients.from_rows(rows) for rows in (grads.rows[: K // 2], grads.rows[K // 2 :])]
        error = ops.gram(*batches, precision="exact").cpu() - truth[: K // 2, K // 2 :]
        return worst(error, size[: K // 2, K // 2 :] * sum_rtol(dtype, exact=True))

    def norms() -> float:
        lengths = truth.diagonal().sqrt()
        return worst(ops.norms(grads).cpu() - lengths, lengths * sum_rtol(dtype, exact=True))

    def norms_of_groups() -> float:
        lengths = of_groups(J).diagonal(dim1=1, dim2=2).sqrt()
        error = ops.norms(grads, groups=groups, num_groups=T).cpu() - lengths
        return worst(error, lengths * sum_rtol(dtype, exact=True) + tiny)

    def rounded(result: Tensor, want: Tensor, most: Tensor) -> float:
        """Sums over the tasks in float32 of terms that are `most` in size, then one rounding."""
        return worst(result - want, want.abs() * eps + most * K * torch.finfo(torch.float32).eps + tiny)

    def off(result: Tensor, weights: Tensor, before: float = 0.0) -> float:
        """Of before + weights J."""
        w = weights.cpu().double()
        return rounded(result, w @ J + before, w.abs() @ J.abs() + before)

    def combine(weights: Tensor, fill: float = torch.nan, accumulate: bool = False) -> float:
        out: list[Tensor | None] = [
            None if x is None else place(x.new_full((*weights.shape[:-1], *x.shape), fill)) for x in grads.examples()
        ]
        result = joined(ops.combine(grads, weights, out=out, accumulate=accumulate))
        return off(result, weights, fill if accumulate else 0.0)

    def combine_groups() -> float:
        of_each = torch.randn(T, K, device=device)
        out = [None if x is None else place(torch.full_like(x, torch.nan)) for x in grads.examples()]
        result = joined(ops.combine(grads, of_each, out=out, groups=groups))
        of_tensors = of_each.cpu().double()[groups]
        terms = of_tensors.repeat_interleave(torch.tensor(elements), dim=0).T * J
        return rounded(result, terms.sum(0), terms.abs().sum(0))

    def flatten() -> float:
        flat = ops.flatten(grads)
        equal = torch.equal(flat.cpu().double(), J) and torch.equal(joined(ops.unflatten(flat[0], grads)), J[0])
        return 0.0 if equal else torch.inf

    def scale_() -> float:
        copy = TaskGradients.from_rows([[None if g is None else place(g.clone()) for g in row] for row in grads.rows])
        want = weights.cpu().double()[:, None] * J
        result = reference.flatten(ops.scale_(copy, weights), torch.float64).cpu()
        return worst(result - want, want.abs() * eps + tiny)

    def state(low: float) -> TaskGradients:
        rows = [[None if g is None else place(torch.rand_like(g) + low) for g in row] for row in grads.rows]
        return TaskGradients.from_rows(rows)

    def advance_() -> float:
        copy, halves = state(-0.5), torch.full((K,), 0.5, device=device)
        before = reference.flatten(copy, torch.float64).cpu()
        result = joined(ops.advance_(grads, copy, halves, halves, weights, halves))
        new, w = (before + J) / 2, weights.cpu().double()
        moved = reference.flatten(copy, torch.float64).cpu() - new
        want, most = w @ new + 0.5 * J.sum(0), w.abs() @ (before.abs() + J.abs()) + J.abs().sum(0)
        allowed = want.abs() * eps + most * K * torch.finfo(torch.float64).eps + tiny
        return max(worst(result - want, allowed), worst(moved, new.abs() * eps + tiny))

    def excess_risks() -> float:
        sums, factors = state(0.0), torch.rand(K, device=device)
        scaled, before = factors.cpu().double()[:, None] * J, reference.flatten(sums, torch.float64).cpu()
        want = (scaled.square() / (before + scaled.square() + 1e-7).sqrt()).sum(1)
        return worst(ops.excess_risks(grads, sums, factors=factors).cpu() - want, want * sum_rtol(dtype, exact=True))

    def project() -> float:
        result = reference.flatten(ops.project(grads), torch.float64).cpu()
        return off(result, reference.solve(truth, "pcgrad_coefficients"))

    def grad_drop() -> float:
        # A draw would decide by the last bit where a purity meets its number; the average decides nothing.
        shares = (J.clamp(min=0).sum(0), J.clamp(max=0).sum(0))
        purity = shares[0] / (shares[0] - shares[1])
        want = (purity * shares[0] + (1 - purity) * shares[1]).nan_to_num(0)
        size = J.abs().sum(0)
        drawn = joined(ops.grad_drop(grads, torch.tensor([5], device=device)))
        taken = torch.minimum((drawn - shares[0]).abs(), (drawn - shares[1]).abs())
        allowed = size * eps + tiny
        return max(worst(joined(ops.grad_drop(grads)) - want, allowed), worst(taken, allowed))

    def trimmed_mean() -> float:
        trim = min(1, (K - 1) // 2)
        want = J.sort(dim=0).values[trim : K - trim].mean(dim=0)
        return worst(joined(ops.trimmed_mean(grads, trim)) - want, J.abs().amax(0) * eps + tiny)

    return {
        "gram, exact": partial(gram, "exact"),
        "gram, fast": partial(gram, "fast"),
        "gram of groups, exact": partial(gram_of_groups, "exact"),
        "gram of groups, fast": partial(gram_of_groups, "fast"),
        "cross-Gram": cross_gram,
        "norms": norms,
        "norms of groups": norms_of_groups,
        "combine": partial(combine, weights),
        "combine, R = 3": partial(combine, coefficients),
        "combine groups": combine_groups,
        "accumulate": partial(combine, weights, fill=0.75, accumulate=True),
        "flatten": flatten,
        "scale_": scale_,
        "advance_": advance_,
        "excess_risks": excess_risks,
        "project": project,
        "grad_drop": grad_drop,
        "trimmed_mean": trimmed_mean,
    }


def check_solves(num_tasks: int, device: str) -> Checks:
    """Each method's weights, off those of the same solver on the CPU, over what is allowed."""
    J = torch.randn(num_tasks, 2 * num_tasks, dtype=torch.float64, device=device)

    def off(method: str) -> float:
        make = solves.METHODS[method][0]
        gram, name, params, inputs, state, tasks, mask = make().solve_arguments(J @ J.T, Step(num_tasks))
        own = {key: x.cpu() for key, x in inputs.items()}
        want = ops.solve(gram.cpu(), name, params, own, None if state is None else state.clone().cpu(), tasks, mask)
        weights = ops.solve(gram, name, params, inputs, state, tasks, mask).cpu()
        return worst(weights - want, want.abs().max() * SOLVE_RTOL)

    return {method: partial(off, method) for method in solves.methods_for(num_tasks)}


def outcome(check: Callable[[], float]) -> float | str:
    """The figure, or what was raised."""
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def passed(figure: float | str) -> bool:
    """NaN does not."""
    return isinstance(figure, float) and figure <= 1


def row_on(setting: Setting, num_tasks: int, dtype: torch.dtype, layout: str, num_tensors: int) -> Row:
    """Every op's figure on one workload."""
    place = LAYOUTS[layout]
    drawn = scattered(num_tasks, setting.checked, dtype, setting.device, num_tensors)
    rows = [[None if g is None else place(g) for g in row] for row in drawn.rows]
    rows[-1][0] = None  # the last task does not reach the first tensor
    checks = check_ops(TaskGradients.from_rows(rows), place)
    label = {"K": num_tasks, "dtype": str(dtype).removeprefix("torch."), "layout": layout, "T": num_tensors}
    return {**label, **{op: outcome(check) for op, check in checks.items()}}


def rows_of(setting: Setting, tasks: tuple[int, ...]) -> Iterator[Row]:
    """For each number of tasks every op on every workload, then the solvers' largest figure; then many tensors."""
    for K in tasks:
        for dtype, layout in itertools.product(DTYPES, LAYOUTS):
            yield row_on(setting, K, dtype, layout, FEW)
        figures = {method: outcome(check) for method, check in check_solves(K, setting.device).items()}
        bad = {method: figure for method, figure in figures.items() if not passed(figure)}
        yield {"K": K, "solve": str(bad) if bad else max(figures.values())}
    for dtype in DTYPES:
        yield row_on(setting, 8, dtype, "misaligned", setting.many)


def judged(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; raises at the end if a figure is above 1."""
    failed = []
    for row in rows:
        yield row
        label = {key: row[key] for key in ("K", "dtype", "layout", "T") if key in row}
        failed += [f"{op} at {label}: {x}" for op, x in row.items() if op not in label and not passed(x)]
    if failed:
        raise AssertionError("\n".join(["larger errors than allowed:", *failed]))


def smoke(setting: Setting) -> Iterator[Row]:
    """Who serves the device, then every op; raises at the end unless it was the kernels, and they were right."""
    who = who_serves(setting.device)
    yield who
    yield from judged(rows_of(setting, TASKS))
    if who["served by"] != "kernels":
        raise AssertionError(f"{setting.device} is served by {who['served by']}: {who['why']}")


def fallback(setting: Setting) -> Iterator[Row]:
    """`smoke` as on a device that no kernel fits: the reference serves, and is right."""
    with patch.object(_native, "serves", return_value=False):
        yield from judged(rows_of(setting, (2, 33)))
