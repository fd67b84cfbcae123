"""Element-wise aggregators against TorchJD's, with and without `accelerate()`, and against LibMTL's GradDrop."""

import pytest
import torch
from test_scalarization import libmtl
from torch import Tensor, nn

from mtlfast import TaskGradients, aggregation, ops
from mtlfast.compat.torchjd import accelerate, restore

jd = pytest.importorskip("torchjd.aggregation", reason="needs the optional group peers")
autojac = pytest.importorskip("torchjd.autojac", reason="needs the optional group peers")
pytestmark = pytest.mark.native

FLOATS = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _off_again():
    yield
    restore()


def both(aggregator, J: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """TorchJD's direction, and that of the same call under `accelerate()`; both leave the generator at one place."""
    torch.manual_seed(seed)
    wanted, after = aggregator(J), torch.rand(3)
    torch.manual_seed(seed)
    with accelerate():
        got = aggregator(J)
    assert torch.equal(torch.rand(3), after)
    assert got.dtype == wanted.dtype
    return got, wanted


@pytest.mark.parametrize("leaking", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("num_tasks", "columns"), [(1, 70), (2, 7), (4, 1000), (8, 70_001), (17, 3000), (40, 999)])
def test_grad_drop_is_torchjds_bit_for_bit(num_tasks, columns, dtype, leaking):
    for seed in range(5):
        J = torch.randn(num_tasks, columns, dtype=dtype)
        J[:, ::7] = 0
        leak = torch.rand(num_tasks, dtype=dtype) if leaking else None
        got, wanted = both(jd.GradDrop(leak=leak), J, seed)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_grad_drop_of_what_is_not_finite_is_torchjds(value):
    J = torch.randn(3, 40)
    J[1, 5] = J[2, 5] = value
    got, wanted = both(jd.GradDrop(), J)
    assert torch.equal(got.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize(
    "make",
    [
        lambda: jd.GradDrop(f=torch.square),
        lambda: jd.GradDrop(leak=torch.rand(4, dtype=torch.float64)),
        lambda: jd.TrimmedMean(1),
    ],
    ids=["a function", "a leak of another dtype", "infinity"],
)
def test_what_torchjd_serves_itself(make):
    J = torch.randn(4, 100)
    J[2, 3] = torch.inf
    torch.manual_seed(1)
    got, wanted = both(make(), J)
    assert torch.equal(got.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_tasks", "trim_number"), [(1, 0), (4, 1), (8, 0), (9, 4), (33, 5), (64, 31), (70, 3)])
def test_trimmed_mean_keeps_what_torchjd_keeps(num_tasks, trim_number, dtype):
    # Small whole numbers: all sums are exact, so that one gradient more or less shows.
    J = torch.randint(-8, 9, (num_tasks, 3000)).to(dtype)
    got, wanted = both(jd.TrimmedMean(trim_number), J)
    # torch divides in the dtype, and 16 bits by way of float32.
    assert torch.allclose(got.double(), wanted.double(), rtol=torch.finfo(dtype).eps, atol=0)
    J = torch.randn(num_tasks, 3000).to(dtype)
    got, wanted = both(jd.TrimmedMean(trim_number), J)
    bound = J.double().abs().amax(0) * torch.finfo(dtype).eps * (num_tasks if dtype in FLOATS else 2)
    assert ((got.double() - wanted.double()).abs() <= bound).all()
    if num_tasks - 2 * trim_number == 1:
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("make", [lambda: jd.TrimmedMean(2), lambda: jd.GradDrop(leak=torch.ones(3))])
def test_errors_are_torchjds(make):
    def message() -> str:
        with pytest.raises(ValueError, match="matrix") as raised:
            make()(torch.ones(4, 5))
        return str(raised.value)

    wanted = message()
    with accelerate():
        assert message() == wanted


@pytest.mark.parametrize("make", [lambda: jd.TrimmedMean(1), jd.GradDrop], ids=["TrimmedMean", "GradDrop"])
@pytest.mark.parametrize("watched", [False, True])
def test_jac_to_grad_reads_the_jacobians_where_they_are(make, watched, monkeypatch):
    def run() -> tuple[list[Tensor], list]:
        torch.manual_seed(3)
        parameters = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(5))]
        seen, aggregator = [], make()
        if watched:
            aggregator.register_forward_hook(lambda module, given, out: seen.append(tuple(given[0].shape)))
        a, b, c = parameters
        autojac.backward([a.square().sum() * b, (c * b).sum(), -a.sum() + c.square().sum(), c.sum()], jac_tensors=None)
        autojac.jac_to_grad(parameters, aggregator)
        return [p.grad for p in parameters], seen

    wanted, seen = run()
    tables = []
    for name in ("grad_drop", "trimmed_mean"):
        original = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda grads, *a, f=original, **k: tables.append(grads.shapes) or f(grads, *a, **k)
        )
    with accelerate():
        got, again = run()
    assert seen == again == ([(4, 12)] if watched else [])
    # An aggregator with hooks must be called on the matrix.
    assert [len(shapes) for shapes in tables] == [1 if watched else 3]
    assert all(torch.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in zip(got, wanted, strict=True))


def test_our_grad_drop_keeps_signs_as_often_as_torchjds():
    # 10,000 draws of each: the numbers of positive results of an element differ by chance alone.
    J, draws = torch.randn(4, 60), 10_000
    ours, theirs = aggregation.GradDrop(generator=torch.Generator().manual_seed(1)), jd.GradDrop()
    torch.manual_seed(2)
    grads = TaskGradients.from_matrix(J)
    counts = torch.zeros(2, 60, dtype=torch.float64)
    for _ in range(draws):
        results = torch.stack([ours(grads)[0], theirs(J)])
        positive, negative = J.clamp(min=0).sum(0), J.clamp(max=0).sum(0)
        assert torch.allclose(torch.where(results > 0, positive, negative), results, atol=1e-5)
        counts += results > 0
    share = counts.sum(0) / (2 * draws)
    mixed = (share > 0) & (share < 1)
    variance = 2 * draws * share * (1 - share)
    statistic = float(((counts[0] - counts[1]) ** 2 / variance)[mixed].sum())
    degrees = int(mixed.sum())
    assert degrees > 40
    assert degrees - 5 * (2 * degrees) ** 0.5 < statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_our_grad_drop_is_libmtls_on_one_sample_of_positive_features():
    # LibMTL multiplies by the features' signs and decides for the sum over the batch: nothing with these.
    method = libmtl("GradDrop")
    trunk, heads = torch.rand(1, 500, requires_grad=True), [torch.randn(500) for _ in range(3)]
    method.rep_grad, method.task_num = True, 3
    for leak in (0.0, 0.3):
        trunk.grad = None
        method.rep = trunk * 1
        gradients = torch.stack(heads)[:, None]
        method._compute_grad = lambda losses, mode, rep_grad, gradients=gradients: gradients
        torch.manual_seed(5)
        method.backward([], leak=leak)
        torch.manual_seed(5)
        drawn = torch.rand(500)
        (ours,) = ops.grad_drop(
            TaskGradients.from_rows([[g] for g in gradients]), uniform=drawn, leak=torch.full((3,), leak)
        )
        # LibMTL adds 1e-7 to the divisor, which no element here is decided by.
        assert torch.allclose(ours, trunk.grad, atol=1e-5)
