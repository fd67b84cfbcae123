"""Ops on random problems: whatever the sizes, tasks, masks, strides and addresses, they agree with plain torch.

Seeded, so every run draws the same problems; MTLFAST_EXAMPLES multiplies their number (`make fuzz`).
"""

import os
from typing import NamedTuple

import torch
from cases import DTYPES, laid_out, matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_combine import assert_close
from test_cross_gram import assert_cross_gram_is_exact
from test_grad_drop import assert_kept, seed_of
from test_gram import assert_gram_is_exact
from test_scale import assert_scaled, copy_of
from test_trimmed_mean import assert_trimmed

from mtlfast import TaskGradients, ops

# Around the borders of vectors, gathered pieces, blocks and chunks, as in cases.SHAPES.
BORDERS = [0, 1, 3, 4, 5, *(n + d for n in (64, 256, 512, 1024, 8192) for d in (-1, 0, 1)), 127, 128]
MOST_ELEMENTS, MOST_TENSORS = 170_000, 1800  # of all tasks, or of nine outputs: an example takes milliseconds
LAYOUTS = {1: "contiguous", 2: "transposed", 4: "channels_last"}


class Problem(NamedTuple):
    """What a problem's gradients are drawn from: short to print, where the tensors are not."""

    num_tasks: int
    shapes: list
    strided: bool  # 2-D tensors transposed, 4-D ones channels_last
    dtype: torch.dtype
    missing: float
    farthest: int  # elements from an aligned address, at most
    seed: int

    def rows(self):
        torch.manual_seed(self.seed)
        return [
            [None if torch.rand(()) < self.missing else self.place(torch.randn(shape)) for shape in self.shapes]
            for _ in range(self.num_tasks)
        ]

    def grads(self):
        return TaskGradients.from_rows(self.rows())

    def place(self, values):
        """`values` in the problem's dtype and layout, up to the end of its memory: a sanitizer sees beyond."""
        values = laid_out(values.to(self.dtype), LAYOUTS[max(values.dim(), 1)] if self.strided else "contiguous")
        offset = int(torch.randint(self.farthest + 1, ()))
        room = torch.empty(offset + values.numel(), dtype=self.dtype)
        return room.as_strided(values.shape, values.stride(), offset).copy_(values)


def shape_of(numel: int, dims: int) -> tuple:
    """`numel` elements in `dims` dimensions, the first few as small as divides it."""
    shape, left = [1] if dims == 4 else [], numel
    while len(shape) < dims - 1:
        shape.append(next(d for d in (2, 3, 5, 7, 1) if left % d == 0))
        left //= shape[-1]
    return (*shape, left)


@st.composite
def problems(draw, dtypes=DTYPES):
    num_tasks = draw(st.integers(1, 20))
    numel = st.one_of(st.sampled_from(BORDERS), st.integers(0, 40))
    drawn = draw(st.lists(st.tuples(numel, st.sampled_from([1, 1, 2, 4])), min_size=1, max_size=12))
    shapes, elements = [], 0
    for size, dims in drawn * draw(st.sampled_from([1, 1, 1, 1, 3, 50, 0])):
        fits = (elements + size) * max(num_tasks, 9) <= MOST_ELEMENTS
        if fits and (len(shapes) + 1) * num_tasks <= MOST_TENSORS:
            elements += size
            shapes.append(shape_of(size, dims))
    return Problem(
        num_tasks,
        shapes,
        draw(st.booleans()),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from([0.0, 0.3, 0.9])),
        draw(st.integers(0, 7)),
        draw(st.integers(0, 2**32 - 1)),
    )


def holds_for(*strategies):
    """A property of everything that the strategies draw."""
    examples = 250 * float(os.environ.get("MTLFAST_EXAMPLES", "1"))
    # Without a deadline, because a sanitizer's build is many times slower.
    slow = settings(
        max_examples=max(1, round(examples)),
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return lambda test: slow(given(*strategies)(test))


def bound(grads):
    """The largest error of each entry of G that docs/promises.md allows. test_gram.py tests that bound itself."""
    J = matrix(grads).abs()
    return J @ J.T * (1e-13 if grads.dtype == torch.float64 else 1e-6)


def room_for(grads, leading, offset, fill):
    """(memory, tensor) for each output: the tensor lies `offset` elements into the memory and ends as far before it."""
    result = []
    for first in grads.examples():
        if first is None:
            result.append((None, None))
            continue
        shape, strides = (*leading, *first.shape), (*(first.numel() for _ in leading), *first.stride())
        numel = torch.Size(shape).numel()
        room = torch.full((numel + 2 * offset,), fill, dtype=first.dtype)
        result.append((room, room.as_strided(shape, strides, offset)))
    return result


num_out = st.sampled_from([None, None, 0, 1, 2, 3, 4, 5, 8, 9])
scales = st.sampled_from([1.0, -0.37, 0.0, 100.0])


def weights_of(problem, R):
    return torch.randn(problem.num_tasks) if R is None else torch.randn(R, problem.num_tasks)


@holds_for(problems())
def test_gram_and_norms_are_within_the_bound(problem):
    assert_gram_is_exact(problem.grads())


@holds_for(problems(), st.integers(1, 19), st.sampled_from(["exact", "fast", None]))
def test_gram_of_two_batches_is_within_the_bound(problem, split, precision):
    rows = problem.rows()
    batches = [TaskGradients.from_rows(part) for part in (rows[:split], rows[min(split, len(rows) - 1) :])]
    assert_cross_gram_is_exact(*batches, precision)


@holds_for(problems())
def test_gram_is_symmetric(problem):
    G = ops.gram(problem.grads())
    assert torch.equal(G, G.T)


@holds_for(problems())
def test_permuting_the_tasks_permutes_gram(problem):
    rows = problem.rows()
    order = torch.randperm(problem.num_tasks)
    grads = TaskGradients.from_rows(rows)
    permuted = ops.gram(TaskGradients.from_rows([rows[k] for k in order]))
    assert ((permuted - ops.gram(grads)[order][:, order]).abs() <= 2 * bound(grads)[order][:, order]).all()


@holds_for(problems(), st.integers(0, 2**16), st.integers(0, 2**16))
def test_splitting_a_tensor_leaves_gram_as_it_is(problem, t, cut):
    rows = problem.rows()
    grads = TaskGradients.from_rows(rows)
    if problem.shapes:
        t %= len(problem.shapes)
        cut %= torch.Size(problem.shapes[t]).numel() + 1
        for row in rows:
            whole = None if row[t] is None else row[t].reshape(-1)
            row[t : t + 1] = [None, None] if whole is None else [whole[:cut], whole[cut:]]
    split = ops.gram(TaskGradients.from_rows(rows))
    assert ((split - ops.gram(grads)).abs() <= 2 * bound(grads)).all()


@holds_for(problems(dtypes=[torch.float32, torch.float64]), st.integers(-20, 20))
def test_a_power_of_two_scales_gram_by_its_square(problem, exponent):
    rows = problem.rows()
    # The same tensors, scaled: what is summed with what must not change.
    scaled = [[None if g is None else g * 2.0**exponent for g in row] for row in rows]
    G = ops.gram(TaskGradients.from_rows(rows))
    assert torch.equal(ops.gram(TaskGradients.from_rows(scaled)), G * 4.0**exponent)


@holds_for(problems(), num_out, scales)
def test_combine(problem, R, scale):
    grads = problem.grads()
    weights = weights_of(problem, R)
    assert_close(grads, ops.combine(grads, weights, scale=scale), weights, scale)


@holds_for(problems(), num_out, scales)
def test_combine_adds_to_out(problem, R, scale):
    grads = problem.grads()
    weights = weights_of(problem, R)
    out = [tensor for _, tensor in room_for(grads, weights.shape[:-1], problem.farthest, 0.0)]
    before = [None if x is None else x.copy_(torch.randn(x.shape)).clone() for x in out]
    result = ops.combine(grads, weights, out=out, accumulate=True, scale=scale)
    assert all(x is target for x, target in zip(result, out, strict=True))
    assert_close(grads, result, weights, scale, plus=before)


@holds_for(problems(), num_out)
def test_combine_writes_all_of_out_and_nothing_beside_it(problem, R):
    grads = problem.grads()
    weights, offset = weights_of(problem, R), problem.farthest
    rooms = room_for(grads, weights.shape[:-1], offset, torch.nan)
    ops.combine(grads, weights, out=[tensor for _, tensor in rooms])
    for room, tensor in rooms:
        if tensor is not None:
            assert tensor.isfinite().all()
            assert room.isnan().sum() == 2 * offset


@holds_for(problems(), st.sampled_from([None, *DTYPES]))
def test_flatten_is_cat(problem, to):
    grads = problem.grads()
    reached = [t for t, shape in enumerate(grads.shapes) if shape is not None]
    J = ops.flatten(grads, to)
    for k, row in enumerate(grads.rows):
        parts = [torch.zeros(grads.shapes[t]) if row[t] is None else row[t] for t in reached]
        cat = torch.cat([torch.zeros(0), *(x.to(grads.dtype).reshape(-1) for x in parts)])
        assert torch.equal(J[k], cat.to(to or grads.dtype))


@holds_for(problems())
def test_scale_is_torchs_product(problem):
    grads = problem.grads()
    before, factors = copy_of(grads), torch.randn(problem.num_tasks)
    assert_scaled(ops.scale_(grads, factors), before, factors)


@holds_for(problems(), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_grad_drop(problem, seed, leaking):
    grads, arguments = problem.grads(), {"seed": seed_of(seed)}
    if leaking:
        arguments["leak"] = torch.rand(problem.num_tasks)
    out = [tensor for _, tensor in room_for(grads, (), problem.farthest, torch.nan)]
    assert_kept(grads, ops.grad_drop(grads, **arguments, out=out), **arguments)


@holds_for(problems(), st.integers(0, 9))
def test_trimmed_mean(problem, trim_number):
    grads = problem.grads()
    trim_number %= (problem.num_tasks + 1) // 2
    out = [tensor for _, tensor in room_for(grads, (), problem.farthest, torch.nan)]
    assert_trimmed(grads, ops.trimmed_mean(grads, trim_number, out), trim_number)
