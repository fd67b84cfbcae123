"""gram and norms against float64, with the bound of promise 3."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, TASKS, draw, draw_rows, laid_out, matrix

from mtlfast import TaskGradients, ops, reference


def assert_gram_is_exact(grads: TaskGradients) -> None:
    J = matrix(grads)
    # sum|a b| times 1e-6 (float64: what the matrix product itself errs by); where nothing is summed, exactly 0.
    bound = (J.abs() @ J.abs().T) * (1e-13 if grads.dtype == torch.float64 else 1e-6)
    G, norms = ops.gram(grads), ops.norms(grads)
    assert G.dtype == norms.dtype == torch.float64
    assert G.device == norms.device == grads.device
    G, norms = G.cpu(), norms.cpu()
    assert G.shape == (grads.num_tasks, grads.num_tasks)
    assert torch.equal(G, G.T)
    assert ((G - J @ J.T).abs() <= bound).all()
    assert ((norms**2 - (J * J).sum(1)).abs() <= bound.diagonal() * 2).all()
    assert ((reference.gram(grads).cpu() - J @ J.T).abs() <= bound).all()
    assert ((reference.norms(grads).cpu() ** 2 - (J * J).sum(1)).abs() <= bound.diagonal() * 2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
def test_shapes(num_tasks, missing, shapes, dtype, device):
    assert_gram_is_exact(draw(num_tasks, shapes, dtype, missing=missing, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [*TASKS, 32, 40])
def test_numbers_of_tasks(num_tasks, dtype, device):
    assert_gram_is_exact(draw(num_tasks, SHAPES["borders"], dtype, missing=0.1, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    assert_gram_is_exact(draw(4, [(5, 7, 3, 3), (65, 33), (129,)], dtype, layout, 0.2, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows_are_the_worst_case(dtype, device):
    # Every float add rounds the same way: few sequential adds keep the error below the bound at any length.
    value = torch.tensor(1.1, dtype=dtype, device=device)
    rows = [[value.expand(1_000_003).clone()] for _ in range(5)]
    grads = TaskGradients.from_rows(rows)
    exact = 1_000_003 * value.double() ** 2
    assert ((ops.gram(grads) - exact).abs() <= exact * 1e-6).all()


def test_tasks_whose_strides_differ(device):
    x = torch.randn(33, 65, device=device)
    rows = [[x], [laid_out(x, "transposed")], [x[:, :1].expand(33, 65)], [x.flip(0)]]
    assert_gram_is_exact(TaskGradients.from_rows(rows))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_comes_out(value, device):
    grads = draw(3, [(1000,), (3,)], device=device)
    grads.rows[1][1][2] = value
    G = ops.gram(grads)
    assert not G[1].isfinite().any()
    assert G[0, 0].isfinite()
    assert G[2, 0].isfinite()
    assert not ops.norms(grads)[1].isfinite()


def test_none_is_never_read_even_beside_infinity(device):
    infinite, ones = torch.full((700,), torch.inf, device=device), torch.ones(5, device=device)
    grads = TaskGradients.from_rows([[infinite, None], [None, ones]])
    G = ops.gram(grads)
    assert G[0, 0] == torch.inf
    assert G[1, 1] == 5


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_over_repeats_schedules_and_addresses(dtype, device, schedules):
    shapes = [(70_001,), (3, 5), (8193,), (255,), (400, 33), (1,)]
    rows = draw_rows(7, shapes, dtype, missing=0.1, device=device)
    elsewhere = [[None if g is None else laid_out(g, "misaligned") for g in row] for row in rows]
    results = []
    for _ in schedules:
        for same in (rows, elsewhere):
            grads = TaskGradients.from_rows(same)
            results += [(ops.gram(grads), ops.norms(grads)) for _ in range(2)]
    for G, norms in results[1:]:
        assert torch.equal(G, results[0][0])
        assert torch.equal(norms, results[0][1])


def test_symmetric_under_permutation_of_tasks_and_scaling_by_powers_of_two(device):
    rows = draw_rows(6, [(1000,), (37,)], device=device)
    order = [3, 0, 5, 1, 4, 2]
    G = ops.gram(TaskGradients.from_rows(rows))
    permuted = ops.gram(TaskGradients.from_rows([rows[k] for k in order]))
    assert torch.allclose(permuted, G[order][:, order], rtol=1e-6, atol=1e-5)
    scaled = ops.gram(TaskGradients.from_rows([[g * 2.0**10 for g in row] for row in rows]))
    assert torch.equal(scaled, G * 2.0**20)


def test_cross_gram_is_declared_only():
    grads = draw(2, [(3,)])
    with pytest.raises(NotImplementedError, match="cross-Gram"):
        ops.gram(grads, grads)
