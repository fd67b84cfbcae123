"""The CUDA kernels of sums and copies, compiled for the CPU, against float64.

MTLFAST_EMULATE=all (make emu) runs the whole grid; without it each kernel, dtype and regime takes a seeded sample.
"""

import itertools

import pytest
import torch
from cases import DTYPES, SHAPES, draw, matrix, wide
from emulate import Emulator
from grids import EMULATED_SHAPES, FAMILIES, TASKS, assert_every_kernel_ran, grid, shapes_for

from mtlfast import TaskGradients, reference

# The sample is made below, and the last test looks at what all the others ran.
pytestmark = pytest.mark.whole

SUM_CASES = grid(DTYPES, TASKS, list(EMULATED_SHAPES), ["contiguous", "misaligned"], [1, 2], per=2)


@pytest.mark.parametrize(("dtype", "num_tasks", "shapes", "layout", "seed"), SUM_CASES, ids=str)
def test_gram_and_norms(emulator: Emulator, dtype, num_tasks, shapes, layout, seed):
    grads = draw(num_tasks, shapes_for(shapes, num_tasks), dtype, layout, missing=0.15)
    J = matrix(grads)
    size = J.abs() @ J.abs().T
    assert ((emulator.norms(grads, seed=seed) ** 2 - (J * J).sum(1)).abs() <= size.diagonal() * 1e-13).all()
    moved = TaskGradients.from_rows([[None if g is None else g.clone() for g in row] for row in grads.rows])
    for name in ("gram", "gram_exact"):
        G = emulator.gram(grads, name, seed=seed)
        assert torch.equal(G, G.T)
        exact = name == "gram_exact" or dtype == torch.float64
        assert ((G - J @ J.T).abs() <= size * (1e-13 if exact else 1e-6)).all()
        # Neither the order of blocks and threads nor addresses change a bit.
        assert torch.equal(emulator.gram(moved, name, seed=0), G)


# Sums in registers; rows staged for 32, 64 and 128 padded rows; row blocks. One group, one for each tensor, a few.
GROUP_CASES = grid(DTYPES, [1, 3, 8, 9, 17, 33, 70], [1, 3, 600], list(EMULATED_SHAPES), [1, 2], per=3)


@pytest.mark.parametrize(("dtype", "num_tasks", "num_groups", "shapes", "seed"), GROUP_CASES, ids=str)
def test_sums_of_groups_of_tensors(emulator: Emulator, dtype, num_tasks, num_groups, shapes, seed):
    grads = draw(num_tasks, shapes_for(shapes, num_tasks), dtype, missing=0.15)
    # Sorted, as the glue passes them; some groups have no tensor, and nothing of theirs is written.
    groups = [t * num_groups // len(grads.shapes) for t in range(len(grads.shapes))]
    some = {group: [t for t, its in enumerate(groups) if its == group] for group in groups}
    first = max(1, num_tasks // 3)
    results = {name: emulator.gram(grads, name, groups, seed=seed) for name in ("gram", "gram_exact")}
    norms = emulator.norms(grads, groups, seed=seed)
    cross = None
    if num_tasks > 1:
        batches = TaskGradients(grads.rows[:first]), TaskGradients(grads.rows[first:])
        cross = emulator.cross_gram(*batches, True, groups, seed=seed)
    for group in range(groups[-1] + 1):
        if not any(grads.shapes[t] is not None and grads.shapes[t].numel() for t in some.get(group, [])):
            assert all(x is None or x[group].isnan().all() for x in (*results.values(), norms, cross))
            continue
        J = matrix(TaskGradients.from_rows([[row[t] for t in some[group]] for row in grads.rows]))
        size = J.abs() @ J.abs().T
        for name, G in results.items():
            exact = name == "gram_exact" or dtype == torch.float64
            assert torch.equal(G[group], G[group].T)
            assert ((G[group] - J @ J.T).abs() <= size * (1e-13 if exact else 1e-6)).all()
        assert ((norms[group] - (J * J).sum(1)).abs() <= size.diagonal() * 1e-13).all()
        if cross is not None:
            assert ((cross[group] - (J @ J.T)[:first, first:]).abs() <= size[:first, first:] * 1e-13).all()
    moved = TaskGradients.from_rows([[None if g is None else g.clone() for g in row] for row in grads.rows])
    assert torch.equal(emulator.gram(moved, "gram", groups, seed=0).nan_to_num(), results["gram"].nan_to_num())
    assert torch.equal(emulator.norms(moved, groups, seed=0).nan_to_num(), norms.nan_to_num())


@pytest.mark.parametrize("num_tasks", [1, 8, 17, 100])
@pytest.mark.parametrize("shapes", ["no tensors", "empty"])
def test_nothing_to_do(emulator: Emulator, shapes, num_tasks):
    grads = draw(num_tasks, SHAPES[shapes])
    assert not emulator.gram(grads).any()
    assert not emulator.gram(grads, "gram_exact").any()
    assert not any(emulator.cross_gram(grads, draw(5, SHAPES[shapes]), exact).any() for exact in (False, True))
    assert not emulator.norms(grads).any()
    assert emulator.flatten(grads).shape == (num_tasks, 0)
    assert [x.numel() for x in emulator.combine(grads, torch.ones(num_tasks))] == [0] * len(grads.shapes)
    assert [x.numel() for x in emulator.grad_drop(grads, torch.tensor([1]))] == [0] * len(grads.shapes)
    if num_tasks <= 64:
        assert [x.numel() for x in emulator.trimmed_mean(grads, 0)] == [0] * len(grads.shapes)
    emulator.scale_(grads, torch.ones(num_tasks))


@pytest.mark.parametrize(("dtype", "num_tasks"), list(itertools.product(DTYPES, [1, 5, 17, 40])), ids=str)
def test_the_slow_gram_agrees(emulator: Emulator, dtype, num_tasks):
    grads = draw(num_tasks, EMULATED_SHAPES["mixed"] + [(3000,)], dtype, missing=0.15)
    J = matrix(grads)
    slow = emulator.gram(grads, "gram_plain", seed=1)
    assert ((slow - J @ J.T).abs() <= (J.abs() @ J.abs().T) * 1e-13).all()
    bound = (J.abs() @ J.abs().T) * (1e-13 if dtype == torch.float64 else 1e-6)
    assert ((emulator.gram(grads, seed=1) - slow).abs() <= bound).all()
    assert ((emulator.gram(grads, "gram_exact", seed=1) - slow).abs() <= (J.abs() @ J.abs().T) * 1e-13).all()


# Sums in registers; up to 16, 32 and 64 rows of a batch staged; more rows than are staged at once, on either side.
BATCHES = [(1, 1), (3, 5), (8, 8), (1, 15), (10, 4), (16, 16), (20, 3), (2, 17), (29, 33), (64, 64), (70, 2), (5, 130)]
CROSS_CASES = grid(DTYPES, BATCHES, list(EMULATED_SHAPES), ["contiguous", "misaligned"], [1, 2], per=2)


@pytest.mark.parametrize(("dtype", "num_tasks", "shapes", "layout", "seed"), CROSS_CASES, ids=str)
def test_cross_gram(emulator: Emulator, dtype, num_tasks, shapes, layout, seed):
    K = num_tasks[0]
    rows = draw(sum(num_tasks), shapes_for(shapes, sum(num_tasks)), dtype, layout, missing=0.15)
    grads, other = TaskGradients(rows.rows[:K]), TaskGradients(rows.rows[K:])
    J = matrix(rows)
    first, second = J[:K], J[K:]
    size = first.abs() @ second.abs().T
    slow = emulator.gram(rows, "gram_plain")[:K, K:] if sum(num_tasks) <= 32 else first @ second.T
    for exact in (False, True):
        G = emulator.cross_gram(grads, other, exact, seed=seed)
        assert ((G - slow).abs() <= size * (1e-13 if exact or dtype == torch.float64 else 1e-6)).all()
        assert torch.equal(emulator.cross_gram(grads, other, exact, seed=0), G)


@pytest.mark.parametrize(
    ("num_tasks", "rows", "launches"),
    [((16, 13), 32, 1), ((17, 3), 64, 1), ((3, 33), 128, 1), ((64, 64), 128, 1), ((65, 64), 128, 2)],
)
def test_cross_gram_stages_what_it_needs(emulator: Emulator, num_tasks, rows, launches):
    grads, other = (draw(K, [(100,), (3,)]) for K in num_tasks)
    emulator.cross_gram(grads, other, False)
    assert len(emulator.launches) == launches
    assert emulator.launches[0] == f"gram_staged_kernel<float,{rows},float>"


# So many columns that one of 1024 blocks would make 128 adds in a row, twice what is allowed: it gets 8 chunks.
WORST = [(3, 8 * 1024 * 4096, torch.float32), *itertools.product([17, 70], [3 * 4096], DTYPES)]


@pytest.mark.parametrize(("num_tasks", "numel", "dtype"), WORST, ids=str)
def test_constant_rows_are_the_worst_case(emulator: Emulator, num_tasks, numel, dtype):
    # 128 float adds of this number's square err by 1.9e-6, 64 by nothing; 1.1 does the like for float16.
    row = torch.full((numel,), 1.9864155 if dtype == torch.float32 else 1.1, dtype=dtype)
    exact = numel * row[0].double() ** 2
    grads = TaskGradients.from_rows([[row]] * num_tasks)
    assert ((emulator.gram(grads) - exact).abs() <= exact * 1e-6).all()
    assert ((emulator.gram(grads, "gram_exact") - exact).abs() <= exact * 1e-13).all()


@pytest.mark.parametrize("num_tasks", [3, 17])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_comes_out(emulator: Emulator, num_tasks, value):
    grads = draw(num_tasks, [(1000,), (3,)])
    grads.rows[1][1][2] = value
    G = emulator.gram(grads)
    assert not G[1].isfinite().any()
    assert G[0, 0].isfinite()
    assert G[2, 0].isfinite()


COMBINE_CASES = grid(DTYPES, DTYPES, [None, 1, 3, 4, 6], [1, 2, 3, 5, 8, 33], [0, 1], [False, True], per=3, take=2)


@pytest.mark.parametrize(("dtype", "out_dtype", "num_out", "num_tasks", "misaligned", "accumulate"), COMBINE_CASES)
def test_combine(emulator: Emulator, dtype, out_dtype, num_out, num_tasks, misaligned, accumulate):
    layout = "misaligned" if misaligned else "contiguous"
    grads = draw(num_tasks, [*SHAPES["mixed"], (4099,)], dtype, layout, missing=0.15)
    weights = torch.randn(num_tasks) if num_out is None else torch.randn(num_out, num_tasks)
    before = None
    if accumulate:
        before = [None if s is None else torch.randn((*weights.shape[:-1], *s)).to(out_dtype) for s in grads.shapes]
    out = None if before is None else [None if x is None else x.clone() for x in before]
    result = emulator.combine(grads, weights, out, accumulate, 0.5, out_dtype, misaligned, seed=3)
    check_combined(grads, result, weights, out_dtype, 0.5, before)


def check_combined(grads, result, weights, out_dtype, scale, before=None):
    """Checks `result` against float64, up to double sums and one rounding to the output."""
    exact = reference.combine(wide(grads), weights, scale=scale)
    sizes = [[None if g is None else g.double().abs() for g in row] for row in grads.rows]
    most = reference.combine(TaskGradients.from_rows(sizes), weights.abs(), scale=abs(scale))
    for t, (x, want, size) in enumerate(zip(result, exact, most, strict=True)):
        assert (x is None) == (want is None)
        if x is None:
            continue
        if before is not None:
            want, size = want + before[t].double(), size + before[t].double().abs()
        info = torch.finfo(out_dtype)
        sums = (grads.num_tasks + 1) * torch.finfo(torch.float64).eps
        assert ((x.double() - want).abs() <= want.abs() * info.eps + size * sums + info.smallest_normal).all()


@pytest.mark.parametrize(("dtype", "num_tasks"), list(itertools.product(DTYPES, TASKS)), ids=str)
def test_combine_over_any_task_and_with_every_number_of_tasks(emulator: Emulator, dtype, num_tasks):
    grads = draw(num_tasks, [(4100,), (3,), (8, 9), (0,)], dtype)
    weights = torch.randn(num_tasks)
    fresh = emulator.combine(grads, weights, seed=1)
    check_combined(grads, fresh, weights, dtype, 1.0)
    own = num_tasks // 2
    for x, want in zip(emulator.combine(grads, weights, grads.rows[own], seed=2), fresh, strict=True):
        assert torch.equal(x, want)


@pytest.mark.parametrize(("dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_combine_by_the_weights_of_groups(emulator: Emulator, dtype, out_dtype):
    grads = draw(5, [(4100,), (3,), (8, 9), (0,), (5000,), (70,)], dtype, missing=0.15)
    weights, groups = torch.randn(3, 5), [2, 0, 0, 1, 2, 1]
    before = [None if s is None else torch.randn(s).to(out_dtype) for s in grads.shapes]
    out = [None if x is None else x.clone() for x in before]
    result = emulator.combine(grads, weights, out, True, 0.5, groups=groups, seed=3)
    for t, group in enumerate(groups):
        column = TaskGradients.from_rows([[row[t]] for row in grads.rows])
        check_combined(column, [result[t]], weights[group], out_dtype, 0.5, [before[t]])


@pytest.mark.parametrize("num_out", [None, 6], ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 8, 17, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_matrix_with_an_odd_number_of_columns(emulator: Emulator, dtype, num_tasks, num_out):
    # Every other row of 16-bit elements begins at no multiple of 4 bytes: words are loaded and shifted, no bit differs.
    J = torch.randn(num_tasks, 4099).to(dtype)
    weights = torch.randn(num_tasks) if num_out is None else torch.randn(num_out, num_tasks)
    before = torch.randn((*weights.shape[:-1], 4099)).to(dtype)
    matrix_rows = TaskGradients.from_matrix(J)
    rows = TaskGradients.from_rows([[row.clone()] for row in J])
    for name in ("gram", "gram_exact"):
        assert torch.equal(emulator.gram(matrix_rows, name, seed=1), emulator.gram(rows, name))
    assert torch.equal(emulator.norms(matrix_rows, seed=1), emulator.norms(rows))
    for misaligned in (0, 1):
        assert torch.equal(emulator.flatten(matrix_rows, dtype, misaligned, seed=1), J)
    for accumulate, out_dtype in itertools.product([False, True], [dtype, torch.float32]):
        results = []
        for grads, offset in ((rows, 0), (matrix_rows, 0), (matrix_rows, 1)):
            room = torch.zeros(before.numel() + offset, dtype=out_dtype)
            out = room[offset:].view(before.shape).copy_(before)
            results += emulator.combine(grads, weights, [out], accumulate, seed=1)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    factors = torch.randn(num_tasks)
    emulator.scale_(matrix_rows, factors, seed=1)
    assert torch.equal(J, torch.stack([row for (row,) in emulator.scale_(rows, factors).rows]))


@pytest.mark.parametrize("num_out", [None, 4])
@pytest.mark.parametrize(("dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_combine_keeps_what_gradients_that_cancel_leave(emulator: Emulator, dtype, out_dtype, num_out):
    gradient = torch.randn(4099).to(dtype)
    grads = TaskGradients.from_rows([[gradient], [gradient], [gradient]])
    weights = torch.tensor([1, 1, 1e-7 - 2], dtype=torch.float64)
    weights = weights if num_out is None else weights.expand(num_out, -1)
    check_combined(grads, emulator.combine(grads, weights, scale=4096, dtype=out_dtype), weights, out_dtype, 4096)


def test_combine_with_more_weights_than_shared_memory_holds(emulator: Emulator):
    grads = draw(70, [(5,), (130,)], missing=0.1)
    weights = torch.randn(70, 70)
    check_combined(grads, emulator.combine(grads, weights, seed=1), weights, torch.float32, 1.0)


def test_combine_of_as_many_tasks_as_a_table_holds(emulator: Emulator):
    grads = TaskGradients.from_rows([[torch.ones(3)]] * 4077)
    assert emulator.combine(grads, torch.ones(4077))[0].tolist() == [4077] * 3
    out = [torch.zeros(3)]
    with pytest.raises(RuntimeError, match="no room for that many tasks"):
        emulator.combine(TaskGradients.from_rows([*grads.rows, [torch.ones(3)]]), torch.ones(4078), out)
    assert out[0].tolist() == [0] * 3


def test_a_surgery_of_eight_tasks_and_400_tensors_is_a_launch_an_op(emulator: Emulator):
    grads = draw(8, [(1 + i % 3,) for i in range(400)])
    emulator.gram(grads)
    assert emulator.launches == ["gram_kernel<float,8,float>"]
    fresh = emulator.combine(grads, torch.ones(8))
    assert emulator.launches == ["combine_kernel<float,float,1>"] * 2  # outputs of their own take room in the table
    for x, want in zip(emulator.combine(grads, torch.ones(8), grads.rows[0]), fresh, strict=True):
        assert torch.equal(x, want)
    assert emulator.launches == ["combine_kernel<float,float,1>"]
    emulator.solve(torch.eye(8, dtype=torch.float64), "pcgrad", [0.0, 0.0], [torch.rand(8, 8, dtype=torch.float64)])
    assert emulator.launches == ["solve_kernel<mtlfast::solvers::PCGrad>"]


@pytest.mark.parametrize("num_groups", [1, 7, 400])
def test_a_surgery_by_groups_of_400_tensors_is_a_launch_an_op(emulator: Emulator, num_groups):
    grads, groups = draw(8, [(1 + i % 3,) for i in range(400)]), [i * num_groups // 400 for i in range(400)]
    G = emulator.gram(grads, groups=groups)
    assert emulator.launches == ["gram_kernel<float,8,float>"]
    emulator.norms(grads, groups)
    assert emulator.launches == ["norms_kernel<float>"]
    emulator.combine(grads, torch.ones(num_groups, 8), grads.rows[0], groups=groups)
    assert emulator.launches == ["combine_kernel<float,float,1>"]
    emulator.solve(G, "pcgrad", [0.0, 0.0], [torch.rand(num_groups, 8, 8, dtype=torch.float64)])
    assert emulator.launches == ["solve_kernel<mtlfast::solvers::PCGrad>"]


def test_a_group_of_more_tensors_than_a_table_holds(emulator: Emulator):
    grads = draw(2, [(1 + i % 3,) for i in range(2500)])
    for groups in ([0] * 2500, [0] * 700 + [1] * 1100 + [3] * 700):
        G, norms = emulator.gram(grads, "gram_exact", groups), emulator.norms(grads, groups)
        for group in set(groups):
            J = matrix(
                TaskGradients.from_rows(
                    [[x for x, its in zip(row, groups, strict=True) if its == group] for row in grads.rows]
                )
            )
            assert torch.allclose(G[group], J @ J.T, rtol=1e-12, atol=1e-12)
            assert torch.allclose(norms[group], (J * J).sum(1), rtol=1e-12, atol=0)


def test_combine_leaves_what_no_task_reaches(emulator: Emulator):
    grads = TaskGradients.from_rows([[torch.ones(3), None], [None, None]])
    assert emulator.combine(grads, torch.ones(2))[1] is None


FLATTEN_CASES = grid(DTYPES, DTYPES, list(EMULATED_SHAPES), ["contiguous", "misaligned"], [0, 1], per=2, take=2)


@pytest.mark.parametrize(("dtype", "out_dtype", "shapes", "layout", "misaligned"), FLATTEN_CASES, ids=str)
def test_flatten(emulator: Emulator, dtype, out_dtype, shapes, layout, misaligned):
    grads = draw(3, EMULATED_SHAPES[shapes], dtype, layout, missing=0.3)
    J = emulator.flatten(grads, out_dtype, misaligned, seed=1)
    assert torch.equal(J, reference.flatten(grads, out_dtype))


SCALE_CASES = grid(DTYPES, TASKS, list(EMULATED_SHAPES), ["contiguous", "misaligned"], per=2)


@pytest.mark.parametrize(("dtype", "num_tasks", "shapes", "layout"), SCALE_CASES, ids=str)
def test_scale(emulator: Emulator, dtype, num_tasks, shapes, layout):
    grads = draw(num_tasks, shapes_for(shapes, num_tasks), dtype, layout, missing=0.15)
    factors = torch.randn(num_tasks)
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = [
        [None if g is None else (g.to(computed_in) * factor.to(computed_in)).to(dtype) for g in row]
        for row, factor in zip(grads.rows, factors, strict=True)
    ]
    emulator.scale_(grads, factors, seed=1)
    for row, want in zip(grads.rows, wanted, strict=True):
        assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(row, want, strict=True))


def test_every_kernel_ran(emulator: Emulator):
    # This test is last in the file, because it looks at what ran above.
    assert_every_kernel_ran(emulator, "test_kernels")


def test_every_kernel_belongs_to_a_file(emulator: Emulator):
    families = {kernel.split("<")[0] for kernel in emulator.compiled()}
    assert families == {family for of_file in FAMILIES.values() for family in of_file}
