"""gram of two batches, the cross-Gram matrix, against float64, within the bounds of docs/promises.md."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, draw, draw_rows, laid_out, matrix

from mtlfast import TaskGradients, ops, reference

PRECISIONS = ["exact", "fast"]
SHORT = [(5, 7, 3, 3), (65, 33), (129,)]


def assert_cross_gram_is_exact(grads: TaskGradients, other: TaskGradients, precision: str | None = None) -> None:
    J = matrix(TaskGradients.from_rows([*grads.rows, *other.rows]))
    first, second = J[: grads.num_tasks], J[grads.num_tasks :]
    rtol = 2e-16 * (10 + J.shape[1] ** 0.5)  # what a sum of P doubles errs by; these P are small: None is exact
    size = first.abs() @ second.abs().T
    truth = torch.stack([(second * row).sum(1) for row in first])
    bound = size * (rtol if grads.dtype == torch.float64 or precision != "fast" else 1e-6)
    G = ops.gram(grads, other, precision)
    assert G.dtype == torch.float64
    assert G.device == grads.device
    assert G.shape == (grads.num_tasks, other.num_tasks)
    assert ((G.cpu() - truth).abs() <= bound).all()
    assert ((reference.gram(grads, other, precision).cpu() - truth).abs() <= size * rtol).all()
    assert ((ops.gram(other, grads, precision).T - G).abs().cpu() <= 2 * bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("num_tasks", [(1, 1), (3, 2), (8, 8)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_shapes(precision, num_tasks, missing, shapes, dtype, device):
    assert_cross_gram_is_exact(*(draw(K, shapes, dtype, missing=missing, device=device) for K in num_tasks), precision)


# Strips of four rows and what is left of one, tiles of three or four columns, rows widened as loaded or beforehand.
BATCHES = [(1, 5), (1, 40), (2, 4), (3, 7), (4, 3), (4, 4), (4, 5), (5, 1), (6, 9), (8, 2), (9, 3), (13, 16), (17, 16)]
BATCHES += [(16, 17), (40, 1), (33, 40), (65, 3), (3, 65)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", BATCHES, ids=str)
@pytest.mark.parametrize("precision", [*PRECISIONS, None])
def test_numbers_of_tasks(precision, num_tasks, dtype, device):
    shapes = SHAPES["borders"]
    assert_cross_gram_is_exact(*(draw(K, shapes, dtype, missing=0.1, device=device) for K in num_tasks), precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other_layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layouts_that_may_differ(precision, other_layout, layout, dtype, device):
    batches = [draw(K, SHORT, dtype, of, 0.2, device) for K, of in ((3, layout), (5, other_layout))]
    assert_cross_gram_is_exact(*batches, precision)


def test_neither_batch_is_changed(device):
    grads, other = draw(2, SHORT, device=device), draw(3, SHORT, layout="transposed", device=device)
    before = [(g, g.clone(), g.data_ptr(), g.stride()) for x in (grads, other) for g in x.flat()]
    ops.gram(grads, other)
    for (g, values, address, strides), now in zip(before, [*grads.flat(), *other.flat()], strict=True):
        assert g is now
        assert (g.data_ptr(), g.stride()) == (address, strides)
        assert torch.equal(g, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [(1, 2), (5, 3)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_constant_rows_are_the_worst_case(precision, num_tasks, dtype, device):
    # Every add rounds the same way: few sequential adds keep the error below the bound at any length.
    value = torch.tensor(1.1, dtype=dtype, device=device)
    batches = [TaskGradients.from_rows([[value.expand(1_000_003).clone()]] * K) for K in num_tasks]
    exact = 1_000_003 * value.double() ** 2
    error = (ops.gram(*batches, precision=precision) - exact).abs()
    assert (error <= exact * (1e-13 if precision == "exact" or dtype == torch.float64 else 1e-6)).all()


@pytest.mark.native
@pytest.mark.parametrize(
    ("num_tasks", "numel", "exact"),
    [((4, 4), 4 * 2**20 + 1, True), ((5, 1), 4 * 2**20 + 1, False), ((1, 5), 4 * 2**20 + 1, False), ((5, 5), 9, True)],
)
def test_none_takes_exact_sums_where_each_batch_would(num_tasks, numel, exact, device):
    shared = torch.full((numel,), 1 / 3, device=device)  # 1/9 is no float: exact and fast sums differ
    batches = [TaskGradients.from_rows([[shared]] * K) for K in num_tasks]
    chosen, other = PRECISIONS if exact else PRECISIONS[::-1]
    assert torch.equal(ops.gram(*batches), ops.gram(*batches, precision=chosen))
    assert not torch.equal(ops.gram(*batches), ops.gram(*batches, precision=other))


@pytest.mark.native
@pytest.mark.parametrize("num_tasks", [2, 9])
def test_exact_sums_take_products_that_float_cannot_hold(num_tasks, device):
    for value in (1e-30, 1e30):
        rows = [[torch.full((700,), value, device=device)] for _ in range(num_tasks)]
        exact = 700 * rows[0][0][0].double() ** 2
        G = ops.gram(TaskGradients.from_rows(rows), TaskGradients.from_rows(rows[1:]), precision="exact")
        assert ((G - exact).abs() <= 1e-13 * exact).all()


@pytest.mark.parametrize("num_tasks", [1, 3, 8, 20])
def test_of_a_batch_with_itself_it_is_the_gram_matrix(num_tasks, device):
    grads = draw(num_tasks, [(1000,), (37,)], missing=0.1, device=device)
    J = matrix(grads).abs()
    assert ((ops.gram(grads, other=grads) - ops.gram(grads)).abs().cpu() <= 2e-13 * J @ J.T).all()


def test_an_order_of_the_tasks_is_one_of_the_entries(device):
    first, second = (draw_rows(6, [(1000,), (37,)], device=device) for _ in range(2))
    order = [3, 0, 5, 1, 4, 2]
    G = ops.gram(TaskGradients.from_rows(first), TaskGradients.from_rows(second))
    permuted = ops.gram(*(TaskGradients.from_rows([rows[k] for k in order]) for rows in (first, second)))
    assert torch.allclose(permuted, G[order][:, order], rtol=1e-12, atol=1e-12)


def test_tensors_that_only_one_batch_reaches(device):
    x = torch.ones(5, device=device)
    grads = TaskGradients.from_rows([[x, x.repeat(140), None], [None, None, 3 * x]])
    other = TaskGradients.from_rows([[2 * x, None, None]])
    assert ops.gram(grads, other).tolist() == [[10.0], [0.0]]
    assert ops.gram(other, grads).tolist() == [[10.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_that_reaches_nothing(dtype, device):
    grads, nothing = draw(3, [(7,), (4,)], dtype, device=device), TaskGradients.from_rows([[None, None]] * 2)
    for G, shape in ((ops.gram(grads, nothing), (3, 2)), (ops.gram(nothing, grads), (2, 3))):
        assert G.shape == shape
        assert G.device == grads.device
        assert not G.any()
    assert ops.gram(nothing, nothing).tolist() == [[0, 0], [0, 0]]
    assert reference.gram(nothing, grads).device == grads.device


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_comes_out(value, device):
    # The other batch's second task does not reach it: 0 times infinity is NaN, so it shows there too.
    grads = draw(3, [(1000,), (3,)], device=device)
    other = TaskGradients.from_rows(
        [[x, x[:3]] if k == 0 else [x, None] for k, (x,) in enumerate(draw(2, [(1000,)], device=device).rows)]
    )
    grads.rows[1][1][2] = value
    for gram in (ops.gram, reference.gram):
        assert not gram(grads, other)[1].isfinite().any()
        assert gram(grads, other)[[0, 2]].isfinite().all()
        assert not gram(other, grads)[:, 1].isfinite().any()


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [(2, 3), (7, 9)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bitwise_equal_over_repeats_schedules_and_addresses(precision, num_tasks, dtype, device, schedules):
    shapes = [(70_001,), (3, 5), (8193,), (255,), (400, 33), (1,)]
    batches = [draw_rows(K, shapes, dtype, missing=0.1, device=device) for K in num_tasks]
    elsewhere = [[[None if g is None else laid_out(g, "misaligned") for g in row] for row in rows] for rows in batches]
    results = []
    for _ in schedules:
        for same in (batches, elsewhere):
            grads, other = (TaskGradients.from_rows(rows) for rows in same)
            results += [ops.gram(grads, other, precision) for _ in range(2)]
    assert all(torch.equal(G, results[0]) for G in results[1:])
