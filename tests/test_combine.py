"""combine against float64: it sums in double and rounds once to the output."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, TASKS, draw, draw_rows, laid_out, wide

from mtlfast import TaskGradients, ops, reference


def assert_close(grads: TaskGradients, result, weights, scale=1.0, plus=None, dtype=None) -> None:
    """Checks that `result` is scale * weights J (+ plus) in `dtype`, up to double sums and one rounding."""
    dtype = dtype or grads.dtype
    weights = weights.cpu()
    exact = reference.combine(wide(grads), weights, scale=scale)
    size = reference.combine(TaskGradients.from_rows(_abs(grads)), weights.abs(), scale=abs(scale))
    one_rounding, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    sums = grads.num_tasks * torch.finfo(torch.float64).eps
    assert len(result) == len(grads.shapes)
    for t, (x, want, most) in enumerate(zip(result, exact, size, strict=True)):
        assert (x is None) == (grads.shapes[t] is None)
        if x is None:
            continue
        assert x.dtype == dtype
        assert x.device == grads.device
        if plus is not None:
            before = plus[t].cpu().double()
            want, most = want + before, most + before.abs()
        assert ((x.cpu().double() - want).abs() <= want.abs() * one_rounding + most * sums + tiny).all()


def weights_of(grads: TaskGradients, num_out: int | None = None) -> torch.Tensor:
    """Random weights [K], or [num_out, K]."""
    return torch.randn(*([] if num_out is None else [num_out]), grads.num_tasks, device=grads.device)


def _abs(grads):
    return [[None if g is None else g.cpu().double().abs() for g in row] for row in grads.rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("num_tasks", [1, 3, 8])
def test_shapes(num_tasks, missing, shapes, dtype, device):
    grads = draw(num_tasks, shapes, dtype, missing=missing, device=device)
    weights = torch.randn(num_tasks, device=grads.device)
    assert_close(grads, ops.combine(grads, weights), weights)
    assert_close(grads, ops.combine(grads, weights.half(), scale=-0.5), weights.half().double(), scale=-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [*TASKS, 33])
@pytest.mark.parametrize("num_out", [None, 0, 1, 3])
def test_numbers_of_tasks_and_outputs(num_out, num_tasks, dtype, device):
    grads = draw(num_tasks, [*SHAPES["borders"], (9001,)], dtype, missing=0.1, device=device)
    weights = weights_of(grads, num_out)
    result = ops.combine(grads, weights)
    for x, shape in zip(result, grads.shapes, strict=True):
        assert shape is None or x.shape == (shape if num_out is None else (num_out, *shape))
    assert_close(grads, result, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout, dtype, device):
    grads = draw(4, [(5, 7, 3, 3), (65, 33), (129,)], dtype, layout, 0.2, device)
    weights = weights_of(grads)
    result = ops.combine(grads, weights)
    assert_close(grads, result, weights)
    for x, example in zip(result, grads.examples(), strict=True):
        assert example is None or x.stride() == example.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 9])
def test_in_place_over_any_task(num_tasks, dtype, device):
    for own in range(num_tasks):
        grads = draw(num_tasks, [(5000,), (3,), (8, 9), (0,)], dtype, device=device)
        weights = weights_of(grads)
        fresh = ops.combine(grads, weights)
        result = ops.combine(grads, weights, out=grads.rows[own])
        for x, want, target in zip(result, fresh, grads.rows[own], strict=True):
            assert x is target
            assert torch.equal(x, want)


@pytest.mark.parametrize("over", ["gradient", "lazy copy"])
def test_a_lazy_copy_gets_its_own_memory_before_it_is_written(over, device):
    # torch._lazy_clone copies at the first write: of the gradient that the result goes over, or of a copy of it.
    first = torch.full((10,), 2.0, device=device)
    gradient = torch._lazy_clone(first) if over == "gradient" else first
    grads = TaskGradients.from_rows([[gradient], [torch.ones_like(gradient)]])
    out = gradient if over == "gradient" else torch._lazy_clone(gradient)
    ops.combine(grads, torch.ones(2, device=device), [out])
    assert out.unique().item() == 3
    assert first.unique().item() == 2
    assert ops.gram(grads)[0, 1] == out.numel() * gradient[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_out", [None, 2])
def test_accumulate(num_out, dtype, device):
    grads = draw(6, [(700,), (3, 5), (4097,)], dtype, device=device)
    weights = weights_of(grads, num_out)
    before = [torch.randn(*weights.shape[:-1], *shape, device=device).to(dtype) for shape in grads.shapes]
    out = [x.clone() for x in before]
    assert_close(grads, ops.combine(grads, weights, out=out, accumulate=True), weights, plus=before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written(dtype, device):
    grads = draw(5, SHAPES["borders"], dtype, device=device)
    for R in (None, 2):
        weights = weights_of(grads, R)
        lead = weights.shape[:-1]
        out = [torch.full((*lead, *shape), torch.nan, dtype=dtype, device=device) for shape in grads.shapes]
        assert all(x.isfinite().all() for x in ops.combine(grads, weights, out=out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("num_out", [None, 0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_of_another_dtype(layout, num_out, to, dtype, device):
    # 5 tasks: more than a group. Tensors beyond a block and a chunk, with and without tails.
    grads = draw(5, [(5, 7, 3, 3), (65, 33), (1,), (0,), (128,), (9001,)], dtype, layout, 0.3, device)
    weights = weights_of(grads, num_out)
    fresh = ops.combine(grads, weights, scale=-0.5, dtype=to)
    assert_close(grads, fresh, weights, scale=-0.5, dtype=to)
    for x, example in zip(fresh, grads.examples(), strict=True):
        assert example is None or x.stride()[weights.dim() - 1 :] == example.stride()

    out = [None if x is None else torch.full_like(x, torch.nan) for x in fresh]
    given = ops.combine(grads, weights, out=out, scale=-0.5)
    assert all(x is target for x, target in zip(given, out, strict=True))
    assert all(x is None or torch.equal(x, y) for x, y in zip(given, fresh, strict=True))

    before = [None if x is None else x.normal_().clone() for x in out]
    assert_close(grads, ops.combine(grads, weights, out=out, accumulate=True), weights, plus=before, dtype=to)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("num_out", [None, 9])
def test_every_element_of_another_dtype_is_written_and_none_beside_it(num_out, to, dtype, device):
    grads = draw(3, SHAPES["borders"], dtype, device=device)
    weights = weights_of(grads, num_out)
    sizes = [shape.numel() * (num_out or 1) for shape in grads.shapes]
    rooms = [torch.full((2 + size,), torch.nan, dtype=to, device=device) for size in sizes]
    out = [room[1:-1].view(*weights.shape[:-1], -1) for room in rooms]
    assert_close(grads, ops.combine(grads, weights, out=out, dtype=to), weights, dtype=to)
    for room, x in zip(rooms, out, strict=True):
        assert x.isfinite().all()
        assert room.isnan().sum() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_many_tasks_round_once(to, dtype, device):
    # Sums in the output's 16 bits would stop growing at 256 (bfloat16) or 2048 (float16).
    grads = TaskGradients.from_matrix(torch.ones(4000, 200, dtype=dtype, device=device))
    out = [torch.full((200,), 2.0, dtype=to, device=device)]
    (x,) = ops.combine(grads, torch.ones(4000, device=device), out=out, accumulate=True)
    assert (x.cpu() == torch.tensor(4002.0, dtype=to)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("num_out", [None, 4])
def test_what_gradients_that_cancel_leave_is_kept(num_out, to, dtype, device):
    gradient = torch.randn(9001, device=device).to(dtype)
    grads = TaskGradients.from_rows([[gradient], [gradient], [gradient]])
    weights = torch.tensor([1, 1, 1e-7 - 2], dtype=torch.float64, device=device)
    weights = weights if num_out is None else weights.expand(num_out, -1)
    assert_close(grads, ops.combine(grads, weights, scale=4096, dtype=to), weights, scale=4096, dtype=to)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_comes_out_even_with_weight_zero(value, device):
    grads, weights = draw(2, [(100,)], device=device), torch.tensor([1.0, 0.0], device=device)
    grads.rows[1][0][37] = value
    (x,) = ops.combine(grads, weights)
    assert not x[37].isfinite()
    assert x.isfinite().sum() == 99
    for to in DTYPES:
        (other,) = ops.combine(grads, weights, dtype=to)
        assert torch.equal(other.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_extremes_round_as_torch_rounds(to, dtype, device):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    values = torch.tensor([info.max, -info.max, info.smallest_normal, tiny, -tiny, 0.0, 1.0, 1 + info.eps], dtype=dtype)
    grads = TaskGradients.from_rows([[values.repeat(20).to(device)]])
    for factor in (1.0, 2.0, 0.5, 0.75, 1.0 + 2**-12):
        wanted = (values.double() * factor).to(to)
        (x,) = ops.combine(grads, torch.tensor([factor], dtype=torch.float64, device=device), dtype=to)
        assert torch.equal(x.cpu(), wanted.repeat(20))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_over_repeats_schedules_and_addresses(dtype, device, schedules):
    rows = draw_rows(7, [(70_001,), (3, 5), (8193,), (1,)], dtype, missing=0.1, device=device)
    elsewhere = [[None if g is None else laid_out(g, "misaligned") for g in row] for row in rows]
    weights = torch.randn(3, 7, device=device)
    results = []
    for _ in schedules:
        for same in (rows, elsewhere):
            grads = TaskGradients.from_rows(same)
            results.append([*ops.combine(grads, weights), *ops.combine(grads, weights[0])])
            results[-1] += [x for to in DTYPES for x in ops.combine(grads, weights[:2], dtype=to)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_weights_of_groups_make_one_sum(num_groups, accumulate, dtype, device):
    grads = draw(4, [(5, 7), (0,), (65,), (), (300,), (9,)], dtype, missing=0.2, device=device)
    weights, groups = weights_of(grads, num_groups), [t % num_groups for t in (2, 0, 1, 0, 2, 1)]
    before = [None if x is None else torch.ones_like(x) for x in grads.examples()] if accumulate else None
    for to in DTYPES:
        plus = None if before is None else [None if x is None else x.to(to) for x in before]
        out = None if plus is None else [None if x is None else x.clone() for x in plus]
        result = ops.combine(grads, weights, out, accumulate, -0.5, to, groups)
        for t, x in enumerate(result):
            column = TaskGradients.from_rows([[row[t]] for row in grads.rows])
            own = None if plus is None else [plus[t]]
            assert_close(column, [x], weights[groups[t]], -0.5, own, dtype=to)
            assert x is None or (x.shape == grads.shapes[t] and x.dtype == to)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_groups_give_the_bits_of_each_alone(dtype, device):
    grads = draw(7, [(20_000,), (3, 5), (8193,), (1,), (400, 33)], dtype, missing=0.1, device=device)
    weights, groups = weights_of(grads, 3), [2, 0, 2, 1, 0]
    fresh = ops.combine(grads, weights, groups=groups)
    for t, x in enumerate(fresh):
        (alone,) = ops.combine(TaskGradients.from_rows([[row[t]] for row in grads.rows]), weights[groups[t]])
        assert x is alone is None or torch.equal(x, alone)
    same = ops.combine(grads, weights, groups=[0] * 5)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(same, ops.combine(grads, weights[0]), strict=True))


@pytest.mark.parametrize(
    ("weights", "groups", "message"),
    [
        (torch.ones(2), [0, 0], r"combine: weights has shape \[2\], expected \[G, 2\] as groups are given"),
        (torch.ones(2, 2), [0], "combine: groups has 1 entries, expected 2, one for each tensor"),
        (torch.ones(2, 2), [0, 2], "combine: tensor 1 is in group 2, expected 0 to 1 as weights has rows"),
        (torch.ones(2, 2), [-1, 0], "combine: tensor 0 is in group -1, expected 0 to 1"),
        (torch.ones(2, 2), [0, 2**70], "combine: tensor 1 is in group 1180591620717411303424, expected 0 to 1"),
    ],
)
def test_groups_that_do_not_fit(weights, groups, message):
    grads = draw(2, [(3,), (4,)])
    with pytest.raises(ValueError, match=message):
        ops.combine(grads, weights, groups=groups)
    assert ops.combine(grads, torch.ones(2, 2))[0].shape == (2, 3)  # without groups: two sums of everything
