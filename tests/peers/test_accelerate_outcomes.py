"""What comes out of TorchJD for any input, errors and NaN among it, comes out under `accelerate()` too.

Every aggregator and its weighting meets every input twice, from the same seed: the same values, or the same error.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mtlfast.compat.torchjd import accelerate, restore

jd = pytest.importorskip("torchjd.aggregation", reason="needs the optional group peers")
autojac = pytest.importorskip("torchjd.autojac", reason="needs the optional group peers")
linalg = pytest.importorskip("torchjd.linalg", reason="needs the optional group peers")
pytestmark = pytest.mark.native

P = torch.tensor([0.1, 0.4, 0.2, 0.3])
MAKE: dict[str, Callable[[], nn.Module]] = {
    "PCGrad": jd.PCGrad,
    "GradVac": jd.GradVac,
    "MGDA": jd.MGDA,
    "CAGrad": lambda: jd.CAGrad(c=0.5),
    "CAGrad, c = 0": lambda: jd.CAGrad(c=0.0),
    "UPGrad": jd.UPGrad,
    "UPGrad, preferring": lambda: jd.UPGrad(P),
    "UPGrad, preferring integers": lambda: jd.UPGrad(torch.tensor([1, 2, 3, 4])),
    "UPGrad, preferring none": lambda: jd.UPGrad(-P),
    "UPGrad, preferring NaN": lambda: jd.UPGrad(P * float("nan")),
    "UPGrad, not regularised": lambda: jd.UPGrad(None, linalg.QuadprogProjector(reg_eps=0.0)),
    "DualProj": jd.DualProj,
    "DualProj, preferring": lambda: jd.DualProj(P.double()),
    "AlignedMTL": jd.AlignedMTL,
    "AlignedMTL, preferring": lambda: jd.AlignedMTL(P, scale_mode="rmse"),
    "AlignedMTL, learning": lambda: jd.AlignedMTL(P.clone().requires_grad_()),
    "AlignedMTL, preferring NaN": lambda: jd.AlignedMTL(P * float("nan")),
    "AlignedMTL, of no mode": lambda: jd.AlignedMTL(scale_mode="max"),
    "IMTLG": jd.IMTLG,
    "Krum": lambda: jd.Krum(0),  # with one nearest other in four rows two tie, and rounding decides
    "Krum, too many against it": lambda: jd.Krum(2),
    "Multi-Krum": lambda: jd.Krum(0, 2),
    "FairGrad": lambda: jd.FairGrad(1.0),
    "FairGrad, alpha = 0": lambda: jd.FairGrad(0.0),
    "FairGrad, alpha = -1": lambda: jd.FairGrad(-1.0),
    "ConFIG": jd.ConFIG,
    "ConFIG, preferring": lambda: jd.ConFIG(P),
    "Mean": jd.Mean,
    "Sum": jd.Sum,
    "Random": jd.Random,
    "Constant": lambda: jd.Constant(P),
    "Constant, float64": lambda: jd.Constant(P.double()),
    "PCD": jd.PCD,
    "TrimmedMean": lambda: jd.TrimmedMean(1),
    "GradDrop": jd.GradDrop,
    "CRMOGM": lambda: jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.UPGradWeighting())),
}


def inputs() -> dict[str, Tensor]:
    """Matrices of all kinds, good and bad."""
    torch.manual_seed(0)
    double = torch.float64
    found = {
        "float32": torch.randn(4, 7),
        "float64": torch.randn(4, 7, dtype=double),
        "float16": torch.randn(4, 7).half(),
        "bfloat16": torch.randn(4, 7).bfloat16(),
        "integers": torch.ones(4, 7, dtype=torch.int64),
        "complex": torch.randn(4, 7, dtype=torch.complex64),
        "no rows": torch.zeros(0, 7),
        "no columns": torch.zeros(4, 0),
        "nothing": torch.zeros(0, 0),
        "one row": torch.randn(1, 7),
        "one number": torch.randn(1, 1),
        "two rows": torch.randn(2, 7),
        "130 rows": torch.randn(130, 9),
        "a vector": torch.randn(4),
        "a number": torch.randn(()),
        "three dimensions": torch.randn(4, 3, 2),
        "zero": torch.zeros(4, 7),
        "ones": torch.ones(4, 7),
        "one row four times": torch.randn(1, 7).expand(4, 7),
        "transposed": torch.randn(7, 4).T,
        "requires grad": torch.randn(4, 7, requires_grad=True),
        "dependent": torch.randn(4, 2, dtype=double) @ torch.randn(2, 7, dtype=double),
    }
    found["zero row"] = found["float64"] * torch.tensor([[1.0], [0.0], [1.0], [1.0]], dtype=double)
    for value in (float("nan"), float("inf"), -float("inf")):
        for name, place in (("number", (1, 2)), ("column", (slice(None), 2)), ("row", (2, slice(None)))):
            found[f"{value} {name}"] = torch.randn(4, 7)
            found[f"{value} {name}"][place] = value
    for scale in (1e-25, 1e-10, 1e3, 1e5, 1e15, 1e25):
        found[f"times {scale}"] = scale * torch.randn(4, 7)
    return found


INPUTS = inputs()
# Where the two differ on purpose, as `accelerate` says; the row says how.
ON_PURPOSE = {
    ("FairGrad", "dependent"),  # no weights satisfy its equations: MGDA's
    ("FairGrad", "a vector"),
    ("ConFIG", "a vector"),  # the preferred projections cancel: no direction
    ("ConFIG, preferring", "a vector"),
    ("FairGrad", "times 1e-10"),  # TorchJD stops far from the solution
    ("CAGrad", "dependent"),  # the optimum is zero, and TorchJD's solver stops before
}
either_way = pytest.mark.parametrize("optimised", [False, True])
every_method = pytest.mark.parametrize("name", MAKE)


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    restore()


def outcome(call: Callable[[], Tensor | None], on: bool) -> Tensor | None | str:
    """The result of the call, or its error as text."""
    torch.manual_seed(3)
    with accelerate() if on else contextlib.nullcontext():
        try:
            return call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def assert_the_same(call: Callable[[], Tensor | None], seen: Tensor, what: object) -> None:
    wanted, got = outcome(call, False), outcome(call, True)
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        assert got == wanted, what
        return
    assert (got.dtype, got.shape, got.requires_grad) == (wanted.dtype, wanted.shape, wanted.requires_grad), what
    one, other = wanted.detach().double(), got.detach().double()
    assert torch.equal(one.isfinite(), other.isfinite()), (what, wanted, got)
    matrix = seen.detach().to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    one, other = one.nan_to_num(0.0, 0.0, 0.0), other.nan_to_num(0.0, 0.0, 0.0)
    if matrix.dim() == 2 and len(one) == len(matrix):  # weights, which need not be unique: the direction is
        one, other = one @ matrix, other @ matrix
    scale = max([float(x.abs().max()) for x in (one, matrix) if x.numel()], default=0.0)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(wanted.dtype, 1e-3)
    assert torch.allclose(one, other, rtol=0, atol=tolerance * scale), (what, wanted, got)


@every_method
def test_aggregators(name):
    for what, matrix in INPUTS.items():
        if (name, what) not in ON_PURPOSE:
            assert_the_same(lambda matrix=matrix: MAKE[name]()(matrix), matrix, what)


@every_method
def test_weightings(name):
    if not hasattr(MAKE[name](), "gramian_weighting"):
        pytest.skip("no Gramian weighting")
    torch.manual_seed(1)
    J = torch.randn(4, 7, dtype=torch.float64)
    dependent = J[:, :2] @ J[:, :2].T
    gramians = {
        **{what: x.detach() @ x.detach().T for what, x in INPUTS.items() if x.dim() == 2},
        "wide": torch.randn(4, 5),
        "tall": torch.randn(5, 4),
        "a vector": torch.randn(4),
        "three dimensions": torch.randn(4, 4, 4),
        "not symmetric": torch.randn(4, 4),
        "symmetric but for rounding": J @ J.T + 1e-15 * torch.randn(4, 4, dtype=torch.float64),
        "negative definite": -(J @ J.T),
        "indefinite": torch.diag(torch.tensor([3.0, -1.0, 2.0, 1.0])),
        "a little indefinite": dependent - 1e-9 * torch.eye(4, dtype=torch.float64),
        "no diagonal": torch.tensor([[0.0, -1, 0, 0], [-1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        "requires grad": (J @ J.T).requires_grad_(),
    }
    for what, gramian in gramians.items():
        if (name, what) not in ON_PURPOSE:
            # Weights of dependent gradients need not be unique.
            seen = INPUTS.get(what, J) if gramian.dim() == 2 else gramian
            assert_the_same(lambda gramian=gramian: MAKE[name]().gramian_weighting(gramian), seen, what)


def fill_grads(name: str, matrix: Tensor, optimised: bool, of_weights: bool = False) -> Tensor | None:
    """TorchJD's `jac_to_grad` for a scalar and another parameter, or for one, as far as the matrix has columns."""
    x = matrix.detach()
    if x.dim() == 2 and x.shape[1] > 1:
        parameters = [nn.Parameter(x.new_ones(())), nn.Parameter(x.new_ones(x.shape[1] - 1))]
        parameters[0].jac, parameters[1].jac = x[:, 0], x[:, 1:]
    else:
        parameters = [nn.Parameter(x.new_ones(x.shape[1:]))]
        parameters[0].jac = x
    weights = autojac.jac_to_grad(parameters, MAKE[name](), optimize_gramian_computation=optimised)
    return weights if of_weights else torch.cat([p.grad.flatten() for p in parameters])


@either_way
@every_method
def test_jac_to_grad(name, optimised):
    for what, matrix in INPUTS.items():
        if (name, what) not in ON_PURPOSE and matrix.dim() > 0 and matrix.is_floating_point():
            for of_weights in (False, True):
                call = partial(fill_grads, name, matrix, optimised, of_weights)
                assert_the_same(call, matrix, (what, of_weights))


class Doubled(jd.UPGrad if jd else object):
    """A user's aggregator with a direction of its own."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        return 2 * super().forward(matrix)


class Combining(jd.UPGrad if jd else object):
    """Another, which combines the rows in its own way."""

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        return 3 * weights @ matrix


def with_weighting(change: Callable[[nn.Module], None]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        aggregator = jd.UPGrad()
        change(aggregator)
        return aggregator

    return make


CHANGED: dict[str, Callable[[], nn.Module]] = {
    "a subclass": Doubled,
    "a subclass that combines": Combining,
    "another weighting": with_weighting(lambda a: setattr(a, "weighting", jd.MeanWeighting())),
    "another Gramian weighting": with_weighting(lambda a: setattr(a, "gramian_weighting", jd.MGDAWeighting())),
    "a forward of its own": with_weighting(lambda a: setattr(a, "forward", lambda matrix: matrix.sum(dim=0))),
    "random preferences": with_weighting(lambda a: setattr(a.gramian_weighting, "weighting", jd.RandomWeighting())),
    "hooked preferences": with_weighting(
        lambda a: a.gramian_weighting.weighting.register_forward_hook(lambda m, given, out: 2 * out)
    ),
    **{
        f"a hook that returns {what}": with_weighting(
            lambda a, f=f: a.gramian_weighting.register_forward_hook(lambda m, given, out, f=f: f(out))
        )
        for what, f in {
            "float64": Tensor.double,
            "one weight less": lambda w: w[:-1],
            "two dimensions": lambda w: w[None],
            "what requires grad": lambda w: w.clone().requires_grad_(),
        }.items()
    },
}


@either_way
@pytest.mark.parametrize("name", CHANGED)
def test_what_users_change(name, optimised, monkeypatch):
    monkeypatch.setitem(MAKE, name, CHANGED[name])
    for of_weights in (False, True):
        matrix = INPUTS["float32"]
        assert_the_same(partial(fill_grads, name, matrix, optimised, of_weights), matrix, name)


def test_hooks_on_every_module():
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *rest: seen.append(type(m).__name__))
    try:
        for on in (False, True):
            outcome(lambda: fill_grads("UPGrad", INPUTS["float32"], False), on)
    finally:
        handle.remove()
    assert len(seen) % 2 == 0
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
