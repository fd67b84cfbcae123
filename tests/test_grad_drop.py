"""grad_drop and sign_purity against float64, and GradDrop's random numbers."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, TASKS, draw, draw_rows, laid_out, wide
from torch import nn

import mtlfast
from mtlfast import TaskGradients, ops, reference
from mtlfast.aggregation import GradDrop
from mtlfast.ops.grad_drop import wide_dtype

NATIVE_FLOATS = [torch.float32, torch.float64]


def seed_of(number: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([number], device=device)


def assert_kept(grads: TaskGradients, result, **arguments) -> None:
    """Checks `result` against the twin in float64, up to double sums and one rounding."""
    arguments = {
        name: x.cpu() if isinstance(x, torch.Tensor) else [y if y is None else y.cpu().double() for y in x]
        for name, x in arguments.items()
    }
    exact = reference.grad_drop(wide(grads), **arguments)
    info, double = torch.finfo(grads.dtype), torch.finfo(torch.float64)
    for x, want, column in zip(result, exact, map(grads.column, range(len(grads.shapes))), strict=True):
        assert (x is None) == (want is None)
        if x is None:
            continue
        assert x.dtype == grads.dtype
        assert x.device == grads.device
        size = sum((g.cpu().double().abs() for g in column if g is not None), torch.zeros_like(want))
        sums = (grads.num_tasks + 4) * double.eps * size
        assert ((x.cpu().double() - want).abs() <= want.abs() * info.eps + sums + info.smallest_normal).all()


def per_tensor(values: torch.Tensor, grads: TaskGradients) -> list:
    return ops.unflatten(values, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("num_tasks", [1, 3, 8])
def test_shapes(num_tasks, missing, shapes, dtype, device):
    grads = draw(num_tasks, shapes, dtype, missing=missing, device=device)
    seed = seed_of(2**40 + num_tasks, grads.device)
    assert_kept(grads, ops.grad_drop(grads, seed), seed=seed)
    assert_kept(grads, ops.grad_drop(grads))
    uniform = torch.rand(grads.numel(), dtype=wide_dtype(grads), device=grads.device)
    assert_kept(grads, ops.grad_drop(grads, uniform=uniform), uniform=per_tensor(uniform, grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [*TASKS, 33])
@pytest.mark.parametrize("leaking", [False, True])
def test_numbers_of_tasks_thresholds_and_leak(leaking, num_tasks, dtype, device):
    grads = draw(num_tasks, [*SHAPES["borders"], (9001,)], dtype, missing=0.1, device=device)
    arguments = {"leak": torch.rand(num_tasks, device=device)} if leaking else {}
    thresholds = per_tensor(torch.rand(grads.numel(), dtype=wide_dtype(grads), device=device), grads)
    seed = seed_of(-num_tasks, device)
    assert_kept(grads, ops.grad_drop(grads, seed, **arguments), seed=seed, **arguments)
    assert_kept(grads, ops.grad_drop(grads, **arguments), **arguments)
    arguments["thresholds"] = thresholds
    assert_kept(grads, ops.grad_drop(grads, seed, **arguments), seed=seed, **arguments)
    assert_kept(grads, ops.grad_drop(grads, **arguments), **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept_and_numbers_follow_the_memory(layout, dtype, device):
    grads = draw(4, [(5, 7, 3, 3), (65, 33), (129,)], dtype, layout, 0.2, device)
    seed = seed_of(3, device)
    result = ops.grad_drop(grads, seed)
    assert_kept(grads, result, seed=seed)
    for x, example in zip(result, grads.examples(), strict=True):
        assert example is None or x.stride() == example.stride()
    uniform = torch.rand(grads.numel(), dtype=wide_dtype(grads), device=device)
    assert_kept(grads, ops.grad_drop(grads, uniform=uniform), uniform=per_tensor(uniform, grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_over_any_task(dtype, device):
    for own in range(3):
        grads = draw(3, [(5000,), (3,), (8, 9), (0,)], dtype, device=device)
        fresh = ops.grad_drop(grads, seed_of(5, device))
        result = ops.grad_drop(grads, seed_of(5, device), out=grads.rows[own])
        for x, want, target in zip(result, fresh, grads.rows[own], strict=True):
            assert x is target
            assert torch.equal(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written_and_none_beside_it(dtype, device):
    grads = draw(5, SHAPES["borders"], dtype, device=device)
    rooms = [torch.full((2 + shape.numel(),), torch.nan, dtype=dtype, device=device) for shape in grads.shapes]
    ops.grad_drop(grads, seed_of(1, device), out=[room[1:-1] for room in rooms])
    assert all(room.isnan().sum() == 2 for room in rooms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_purities(dtype, device):
    grads = draw(5, [*SHAPES["borders"], (0,)], dtype, missing=0.3, device=device)
    for x, want in zip(ops.sign_purity(grads), reference.sign_purity(wide(grads)), strict=True):
        assert (x is None) == (want is None)
        if x is not None:
            assert x.dtype == wide_dtype(grads)
            assert torch.allclose(x.cpu().double(), want, rtol=torch.finfo(x.dtype).eps, atol=1e-15)


@pytest.mark.parametrize("dtype", NATIVE_FLOATS, ids=str)
@pytest.mark.parametrize("leaking", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 8, 16, 33])
def test_round_each_is_plain_torch(num_tasks, leaking, dtype, device):
    grads = draw(num_tasks, [*SHAPES["borders"], (9001,)], dtype, missing=0.1, device=device)
    leak = torch.rand(num_tasks, device=device) if leaking else None
    uniform = per_tensor(torch.rand(grads.numel(), dtype=dtype, device=device), grads)
    # torch adds the last columns of a matrix in another order than the others, so that purities differ in the last bit.
    for x, want in zip(ops.sign_purity(grads, round_each=True), reference.sign_purity(grads, True), strict=True):
        assert x is None or torch.allclose(x, want, rtol=0, atol=num_tasks * torch.finfo(dtype).eps)
    thresholds = reference.sign_purity(grads, True)
    result = ops.grad_drop(grads, uniform=uniform, thresholds=thresholds, leak=leak, round_each=True)
    for x, want in zip(result, reference.grad_drop(grads, None, uniform, thresholds, leak, True), strict=True):
        assert x is want is None or torch.equal(x, want)


def test_elements_without_gradients_are_zero_and_have_no_sign(device):
    grads = TaskGradients.from_matrix(torch.zeros(3, 100, device=device))
    for result in (
        ops.grad_drop(grads, seed_of(0, device)),
        ops.grad_drop(grads),
        ops.grad_drop(grads, uniform=[grads.rows[0][0]]),
    ):
        assert not result[0].any()
    assert (ops.sign_purity(grads)[0] == 0.5).all()
    assert ops.sign_purity(grads, round_each=True)[0].isnan().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_makes_nan(value, device):
    grads, leak = draw(2, [(100,)], device=device), torch.tensor([0.5, 1.0], device=device)
    grads.rows[1][0][37] = value
    for arguments in ({}, {"leak": leak}):
        for seed in (None, *(seed_of(number, device) for number in range(8))):
            (x,) = ops.grad_drop(grads, seed, **arguments)
            assert x.isnan().nonzero().tolist() == [[37]]
    assert ops.sign_purity(grads)[0].isnan().nonzero().tolist() == [[37]]
    (x,) = ops.grad_drop(grads, uniform=torch.rand(100, device=device), round_each=True)
    assert x.isfinite().logical_not().nonzero().tolist() == [[37]]


def test_one_sign_is_always_kept_whatever_is_drawn(device):
    # A number that were 0 or 1 would drop a gradient about which all tasks agree.
    grads = TaskGradients.from_matrix(torch.tensor([[1.0], [2.0]], device=device).expand(2, 200_000).contiguous())
    assert (ops.grad_drop(grads, seed_of(7, device))[0] == 3).all()
    opposite = TaskGradients.from_rows([[-g for g in row] for row in grads.rows])
    assert (ops.grad_drop(opposite, seed_of(7, device))[0] == -3).all()


def test_random_numbers_are_philox():
    # The first block of Random123's test vectors for a key and a counter of zeros.
    words = reference.elementwise.philox(torch.tensor(0), torch.tensor([0]))
    assert [int(x) for x in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # Thresholds tell which numbers the kernel draws.
    wanted = torch.tensor([(2 * (int(x) >> 9) + 1) / 2**24 for x in words])
    grads = TaskGradients.from_matrix(torch.tensor([[1.0], [-1.0]]).expand(2, 4).contiguous())
    for change, kept in ((2**-24, 1), (0, 0), (-(2**-24), -1)):
        assert ops.grad_drop(grads, seed_of(0), thresholds=wanted + change)[0].tolist() == [kept] * 4


def test_numbers_of_different_seeds_and_places_are_independent():
    grads = TaskGradients.from_matrix(torch.tensor([[1.0], [-1.0]]).expand(2, 50_000).contiguous())
    kept = torch.stack([ops.grad_drop(grads, seed_of(number))[0] for number in (0, 1, 2**32, -1)])
    assert (kept.corrcoef() - torch.eye(4)).abs().max() < 0.02
    for distance in range(1, 9):
        assert torch.stack([kept[0, :-distance], kept[0, distance:]]).corrcoef()[0, 1].abs() < 0.02


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_over_repeats_schedules_and_addresses(dtype, device, schedules):
    rows = draw_rows(7, [(70_001,), (3, 5), (8193,), (1,)], dtype, missing=0.1, device=device)
    elsewhere = [[None if g is None else laid_out(g, "misaligned") for g in row] for row in rows]
    leak = torch.rand(7, device=device)
    results = []
    for _ in schedules:
        for same in (rows, elsewhere):
            grads = TaskGradients.from_rows(same)
            results.append(
                [*ops.grad_drop(grads, seed_of(9, device)), *ops.grad_drop(grads, seed_of(9, device), leak=leak)]
            )
            results[-1] += ops.sign_purity(grads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_numbers_do_not_depend_on_how_tensors_are_cut():
    matrix = torch.randn(3, 20_000)
    whole = ops.grad_drop(TaskGradients.from_matrix(matrix), seed_of(4))[0]
    for sizes in ([1, 2, 3, 19_994], [9_999, 10_001], [8192, 11_808]):
        parts = ops.grad_drop(TaskGradients.from_rows([list(row.split(sizes)) for row in matrix]), seed_of(4))
        assert torch.equal(torch.cat(parts), whole)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_signs_are_kept_as_often_as_their_purity_says():
    # 10,000 draws of elements with purities from 0.05 to 0.95: one statistic with a degree of freedom for each element.
    purities = torch.linspace(0.05, 0.95, 91, dtype=torch.float64)
    grads = TaskGradients.from_rows([[purities], [purities - 1]])
    aggregator = GradDrop(generator=torch.Generator().manual_seed(3))
    draws, positive = 10_000, torch.zeros_like(purities)
    for _ in range(draws):
        (x,) = aggregator(grads)
        assert ((x == purities) | (x == purities - 1)).all()
        positive += x > 0
    counts = torch.cat([positive, draws - positive])
    expected = draws * torch.cat([purities, 1 - purities])
    assert 91 - 5 * (2 * 91) ** 0.5 < chi_square(counts, expected) < 91 + 5 * (2 * 91) ** 0.5
    aggregator.eval()
    assert torch.allclose(aggregator(grads)[0], purities * purities + (1 - purities) * (purities - 1))


def test_a_function_of_the_purity_moves_the_draw():
    matrix = torch.tensor([[0.7], [-0.3]]).expand(2, 100_000).contiguous()
    square = GradDrop(f=torch.square, generator=torch.Generator().manual_seed(0))
    assert abs(float((square(matrix) > 0).float().mean()) - 0.49) < 0.01
    always = GradDrop(f=torch.ones_like)
    assert torch.equal(always(matrix), matrix.clamp(min=0).sum(0))
    assert torch.allclose(square.eval()(matrix), torch.tensor(0.49 * 0.7 - 0.51 * 0.3))


def test_leak_lets_a_share_through_and_belongs_to_its_task():
    matrix = torch.randn(3, 50)
    whole = GradDrop(leak=[1.0, 1.0, 1.0])
    assert torch.allclose(whole(matrix), matrix.sum(0))
    some = GradDrop(leak=[0.0, 0.0, 1.0])
    (x,) = some(TaskGradients.from_matrix(matrix[1:]), tasks=[0, 2])
    assert all(abs(v - b) < 1e-6 or abs(v - b - a) < 1e-6 for v, a, b in zip(x, matrix[1], matrix[2], strict=True))
    with pytest.raises(ValueError, match=r"GradDrop: got tasks \[0, 1\], expected 3 tasks"):
        some(matrix[:2])
    with pytest.raises(ValueError, match=r"GradDrop: leak is \[0.5, 1.5\], expected numbers from 0 to 1"):
        GradDrop(leak=[0.5, 1.5])


def test_it_drops_gradients_of_features():
    # As its paper has it: the features' gradients are dropped, and the trunk gets one pass of what is kept.
    trunk, heads = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
    x, aggregator = torch.randn(4, 5), GradDrop(generator=torch.Generator().manual_seed(2))
    features = trunk(x)
    losses = [head(features).square().mean() for head in heads]
    rows = [torch.autograd.grad(loss, features, retain_graph=True) for loss in losses]
    (kept,) = GradDrop(generator=torch.Generator().manual_seed(2))(TaskGradients.from_rows(rows))
    wanted = torch.autograd.grad(features, list(trunk.parameters()), kept, retain_graph=True)
    mtlfast.backward(losses, aggregator, at=features)
    assert all(torch.allclose(p.grad, w) for p, w in zip(trunk.parameters(), wanted, strict=True))


def test_numbers_are_uniform():
    grads = TaskGradients.from_matrix(torch.tensor([[1.0], [-1.0]]).expand(2, 100_000).contiguous())
    for p in torch.linspace(0.1, 0.9, 9):
        (x,) = ops.grad_drop(grads, seed_of(11), thresholds=p.expand(100_000).contiguous())
        assert abs(float((x > 0).double().mean() - p)) < 0.008


def test_thresholds_that_do_not_fit_are_refused_before_anything_is_drawn():
    for f, error, message in [
        (lambda p: p.mean(), ValueError, r"GradDrop: f returned \[\] torch.float32, expected \[2, 3\] torch.float32"),
        (
            lambda p: p.double(),
            ValueError,
            r"GradDrop: f returned \[2, 3\] torch.float64, expected \[2, 3\] torch.float32",
        ),
        (lambda p: 0.5, TypeError, "GradDrop: f returned a float, expected a tensor"),
    ]:
        grads = TaskGradients.from_rows([[torch.randn(2, 3)], [torch.randn(2, 3)]])
        before = torch.get_rng_state()
        with pytest.raises(error, match=message):
            GradDrop(f=f)(grads)
        assert torch.equal(torch.get_rng_state(), before)
