"""gram and norms against float64, within the bounds of docs/promises.md for exact and for fast sums."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, TASKS, draw, draw_rows, laid_out, matrix

from mtlfast import TaskGradients, ops, reference
from mtlfast.aggregation._jacobian import RowsJacobian
from mtlfast.ops._precision import exact_sums, sum_rtol

PRECISIONS = ["exact", "fast"]


def products(J: torch.Tensor) -> torch.Tensor:
    """J J^T, summed in pairs: a matrix product may add one element after another."""
    return torch.stack([(J * row).sum(1) for row in J])


def assert_gram_is_exact(grads: TaskGradients, precision: str | None = None) -> None:
    J = matrix(grads)
    # Times sum|a b|: 1e-6, or what a sum of P doubles errs by; of nothing, exactly 0.
    exact = grads.dtype == torch.float64 or precision != "fast"  # these P are small: None is exact
    rtol = 2e-16 * (10 + J.shape[1] ** 0.5) if exact else 1e-6
    size = J.abs() @ J.abs().T
    truth = products(J)
    bound, exact_bound = size * rtol, size * 2e-16 * (10 + J.shape[1] ** 0.5)
    G, norms = ops.gram(grads, precision=precision), ops.norms(grads)
    assert G.dtype == norms.dtype == torch.float64
    assert G.device == norms.device == grads.device
    G, norms = G.cpu(), norms.cpu()
    assert G.shape == (grads.num_tasks, grads.num_tasks)
    assert torch.equal(G, G.T)
    assert ((G - truth).abs() <= bound).all()
    assert ((norms**2 - (J * J).sum(1)).abs() <= exact_bound.diagonal() * 2).all()
    assert ((reference.gram(grads, precision=precision).cpu() - truth).abs() <= exact_bound).all()
    assert ((reference.norms(grads).cpu() ** 2 - (J * J).sum(1)).abs() <= exact_bound.diagonal() * 2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_shapes(precision, num_tasks, missing, shapes, dtype, device):
    assert_gram_is_exact(draw(num_tasks, shapes, dtype, missing=missing, device=device), precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [*TASKS, 32, 33, 40])
@pytest.mark.parametrize("precision", [*PRECISIONS, None])
def test_numbers_of_tasks(precision, num_tasks, dtype, device):
    assert_gram_is_exact(draw(num_tasks, SHAPES["borders"], dtype, missing=0.1, device=device), precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tasks", [4, 6])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layouts(precision, num_tasks, layout, dtype, device):
    assert_gram_is_exact(draw(num_tasks, [(5, 7, 3, 3), (65, 33), (129,)], dtype, layout, 0.2, device), precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [3, 5])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_constant_rows_are_the_worst_case(precision, num_tasks, dtype, device):
    # Every add rounds the same way: few sequential adds keep the error below the bound at any length.
    value = torch.tensor(1.1, dtype=dtype, device=device)
    rows = [[value.expand(1_000_003).clone()] for _ in range(num_tasks)]
    grads = TaskGradients.from_rows(rows)
    exact = 1_000_003 * value.double() ** 2
    error = (ops.gram(grads, precision=precision) - exact).abs()
    assert (error <= exact * sum_rtol(dtype, precision == "exact")).all()
    assert ((ops.norms(grads) ** 2 - exact).abs() <= exact * sum_rtol(dtype, exact=True)).all()


def groups_of(how: str, num_tensors: int) -> list[int]:
    """The groups of tensors: sorted or not, and with a group 1 that has none."""
    if how == "each":
        return list(range(num_tensors))
    return [{"one": 0, "in turn": t % 3 * 2, "halves": t // ((num_tensors + 1) // 2)}[how] for t in range(num_tensors)]


GROUPED = ["one", "each", "in turn", "halves"]


def assert_groups_are_exact(grads: TaskGradients, groups: list[int], num_groups: int, precision: str) -> None:
    G = ops.gram(grads, precision=precision, groups=groups, num_groups=num_groups)
    first = max(1, grads.num_tasks // 2)
    a, b = TaskGradients.from_rows(grads.rows[:first]), TaskGradients.from_rows(grads.rows[first - 1 :])
    cross = ops.gram(a, b, precision, groups, num_groups)
    norms, ones = (ops.norms(grads, order, groups, num_groups) for order in (2, 1))
    assert G.shape == (num_groups, grads.num_tasks, grads.num_tasks)
    assert norms.shape == ones.shape == G.shape[:2]
    assert all(x.device == grads.device and x.dtype == torch.float64 for x in (G, cross, norms, ones))
    slow_G = reference.gram(grads, None, precision, groups, num_groups)
    assert torch.allclose(reference.norms(grads, 2, groups, num_groups), norms, rtol=1e-12, atol=0)
    for group in range(num_groups):
        columns = [t for t, its in enumerate(groups) if its == group]
        J = matrix(TaskGradients.from_rows([[row[t] for t in columns] for row in grads.rows]))
        size, truth = J.abs() @ J.abs().T, products(J)
        exact = grads.dtype == torch.float64 or precision == "exact"
        exact_bound = size * 2e-16 * (10 + J.shape[1] ** 0.5)
        bound = exact_bound if exact else size * 1e-6
        assert ((slow_G[group].cpu() - truth).abs() <= exact_bound).all()
        assert torch.equal(G[group], G[group].T)
        assert ((G[group].cpu() - truth).abs() <= bound).all()
        assert ((cross[group].cpu() - truth[:first, first - 1 :]).abs() <= bound[:first, first - 1 :]).all()
        assert torch.allclose(norms[group].cpu() ** 2, (J * J).sum(1), rtol=1e-12, atol=0)
        assert torch.allclose(ones[group].cpu(), J.abs().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", GROUPED)
@pytest.mark.parametrize("num_tasks", [1, 4, 9])
def test_groups_of_tensors(num_tasks, how, shapes, dtype, device):
    grads = draw(num_tasks, shapes, dtype, missing=0.3, device=device)
    groups = groups_of(how, len(shapes))
    for precision in PRECISIONS:
        assert_groups_are_exact(grads, groups, max(groups, default=0) + 2, precision)


@pytest.mark.parametrize("num_tasks", [3, 20, 70])
@pytest.mark.parametrize("how", GROUPED)
def test_groups_of_tensors_longer_than_a_chunk_and_shorter(how, num_tasks, device):
    shapes = [(20_000,), (1,), (8192,), (8191,), (3,), (30_001,), (255,), (64,)]
    groups = groups_of(how, len(shapes))
    for precision in PRECISIONS:
        assert_groups_are_exact(draw(num_tasks, shapes, device=device), groups, max(groups) + 1, precision)


@pytest.mark.native
def test_one_group_gives_the_bits_of_none(device):
    grads = draw(5, [(20_000,), (1,), (8192,), (300, 7)], device=device)
    if device == "cpu":  # a GPU's blocks take other chunks
        assert torch.equal(ops.gram(grads, groups=[0] * 4)[0], ops.gram(grads))
        assert torch.equal(ops.norms(grads, groups=[0] * 4)[0], ops.norms(grads))
    assert ops.gram(grads, groups=[0] * 4, num_groups=3)[1:].eq(0).all()


def test_a_group_does_not_meet_what_is_not_finite_in_another(device):
    rows = [[torch.full((700,), torch.inf, device=device), torch.ones(5, device=device)] for _ in range(2)]
    grads = TaskGradients.from_rows(rows)
    for groups in ([0, 1], [1, 0]):
        assert ops.gram(grads, groups=groups)[groups[1]].unique().tolist() == [5]


@pytest.mark.parametrize(
    ("groups", "num_groups", "message"),
    [
        ([0], None, "{op}: groups has 1 entries, expected 2, one for each tensor"),
        ([-1, -1], None, "{op}: tensor 0 is in group -1, expected 0 to 0"),
        ([0, 2**21], None, "{op}: tensor 1 is in group 2097152, expected 0 to 2097151"),
        ([0, 2**31], None, "{op}: tensor 1 is in group 2147483648, expected 0 to 2097151"),
        ([0, 2**70], None, "{op}: tensor 1 is in group 1180591620717411303424, expected 0 to 2097151"),
        ([0, 1], 0, "{op}: num_groups is 0, expected 1 to 2097152"),
        ([0, 1], -1, "{op}: num_groups is -1, expected 1 to 2097152"),
        ([0, 1], 2**40, "{op}: num_groups is 1099511627776, expected 1 to 2097152"),
        ([0, 2], 2, "{op}: tensor 1 is in group 2, expected 0 to 1"),
        ([-1, 0], None, "{op}: tensor 0 is in group -1, expected 0 to 0"),
    ],
)
def test_groups_that_do_not_fit(groups, num_groups, message, device):
    grads = draw(2, [(3,), (4,)], device=device)
    for op in (ops.gram, ops.norms):
        with pytest.raises(ValueError, match=message.format(op=op.__name__)):
            op(grads, groups=groups, num_groups=num_groups)


NO_GROUPS = [
    ([0.0, 1.0], "groups has 0.0 for tensor 0, expected the index of a group"),
    ([0, "a"], "groups has 'a' for tensor 1, expected the index of a group"),
    ([0, None], "groups has None for tensor 1, expected the index of a group"),
    ("ab", "groups is a str, expected a list with the index of a group for each tensor"),
    (5, "groups is a int, expected a list with"),
    (torch.tensor([0, 1]), "groups is a Tensor, expected a list with"),
]


@pytest.mark.parametrize(("groups", "message"), NO_GROUPS)
@pytest.mark.parametrize("op", ["gram", "norms", "combine"])
def test_what_is_no_list_of_indices_is_refused(op, groups, message):
    grads = draw(2, [(3,), (4,)])
    more = [torch.ones(2, 2)] if op == "combine" else []
    with pytest.raises(TypeError, match=f"^{op}: {message}"):
        getattr(ops, op)(grads, *more, groups=groups)


@pytest.mark.parametrize("wrong", [2.0, "2"])
def test_the_number_of_groups_is_an_integer(wrong):
    for op in (ops.gram, ops.norms):
        with pytest.raises(TypeError, match=f"{op.__name__}: num_groups is {wrong!r}, expected an integer"):
            op(draw(2, [(3,)]), groups=[0], num_groups=wrong)


@pytest.mark.native
@pytest.mark.parametrize(
    ("num_tasks", "numel", "exact"),
    [(1, 4 * 2**20 + 1, True), (4, 4 * 2**20 + 1, True), (5, 4 * 2**20 + 1, False), (5, 4 * 2**20, True)],
)
def test_none_takes_exact_sums_for_few_tasks_or_few_elements(num_tasks, numel, exact, device):
    shared = torch.randn(numel, device=device)
    grads = TaskGradients.from_rows([[shared]] * num_tasks)
    chosen, other = PRECISIONS if exact else PRECISIONS[::-1]
    assert exact_sums("gram", grads) is exact
    assert RowsJacobian(grads).product_rtol() == (1e-13 if exact else 1e-6)
    assert torch.equal(ops.gram(grads), ops.gram(grads, precision=chosen))
    assert not torch.equal(ops.gram(grads), ops.gram(grads, precision=other))


@pytest.mark.native
def test_float64_has_one_way(device):
    grads = draw(3, [(3001,)], torch.float64, device=device)
    assert torch.equal(ops.gram(grads, precision="exact"), ops.gram(grads, precision="fast"))


@pytest.mark.native
@pytest.mark.parametrize("num_tasks", [2, 9])
def test_exact_sums_take_products_that_float_cannot_hold(num_tasks, device):
    for value in (1e-30, 1e30):
        rows = [[torch.full((700,), value, device=device)] for _ in range(num_tasks)]
        exact = 700 * rows[0][0][0].double() ** 2
        grads = TaskGradients.from_rows(rows)
        assert ((ops.gram(grads, precision="exact") - exact).abs() <= 1e-13 * exact).all()
        assert ((ops.norms(grads) - exact.sqrt()).abs() <= 1e-13 * exact.sqrt()).all()


def test_what_precision_can_be():
    for value in ("double", "", True, 1):
        with pytest.raises(ValueError, match=r"gram: precision is .*, expected 'exact', 'fast' or None"):
            ops.gram(draw(2, [(3,)]), precision=value)


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
@pytest.mark.parametrize("num_tasks", [3, 7])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bitwise_equal_over_repeats_schedules_and_addresses(precision, num_tasks, dtype, device, schedules):
    shapes = [(70_001,), (3, 5), (8193,), (255,), (400, 33), (1,)]
    rows = draw_rows(num_tasks, shapes, dtype, missing=0.1, device=device)
    elsewhere = [[None if g is None else laid_out(g, "misaligned") for g in row] for row in rows]
    results, grouped, groups = [], [], [0, 2, 0, 1, 1, 2]
    for _ in schedules:
        for same in (rows, elsewhere):
            grads = TaskGradients.from_rows(same)
            results += [(ops.gram(grads, precision=precision), ops.norms(grads)) for _ in range(2)]
            grouped.append((ops.gram(grads, None, precision, groups), ops.norms(grads, groups=groups)))
    for G, norms in results[1:]:
        assert torch.equal(G, results[0][0])
        assert torch.equal(norms, results[0][1])
    assert all(torch.equal(a, b) for both in grouped[1:] for a, b in zip(both, grouped[0], strict=True))


def test_symmetric_under_permutation_of_tasks_and_scaling_by_powers_of_two(device):
    rows = draw_rows(6, [(1000,), (37,)], device=device)
    order = [3, 0, 5, 1, 4, 2]
    G = ops.gram(TaskGradients.from_rows(rows))
    permuted = ops.gram(TaskGradients.from_rows([rows[k] for k in order]))
    assert torch.allclose(permuted, G[order][:, order], rtol=1e-6, atol=1e-5)
    scaled = ops.gram(TaskGradients.from_rows([[g * 2.0**10 for g in row] for row in rows]))
    assert torch.equal(scaled, G * 2.0**20)
