"""The same script with the same seeds has the same results in TorchJD with and without `accelerate()`."""

import copy
import doctest
import importlib

import pytest
import torch
from torch import Tensor, nn

from mtlfast import ops
from mtlfast.compat import torchjd as face
from mtlfast.compat.torchjd import accelerate, restore, status

jd = pytest.importorskip("torchjd.aggregation", reason="needs the optional group peers")
autojac = pytest.importorskip("torchjd.autojac", reason="needs the optional group peers")

PREFERENCES = torch.tensor([0.1, 0.4, 0.2, 0.3])
# name -> how it is made; those that mtlfast has a solver for.
ACCELERATED = {
    "PCGrad": lambda dtype: jd.PCGrad(),
    "GradVac": lambda dtype: jd.GradVac(),
    "MGDA": lambda dtype: jd.MGDA(),
    "CAGrad": lambda dtype: jd.CAGrad(c=0.5),
    "UPGrad": lambda dtype: jd.UPGrad(),
    "UPGrad, preferring": lambda dtype: jd.UPGrad(PREFERENCES.to(dtype)),
    "DualProj": lambda dtype: jd.DualProj(),
    "AlignedMTL": lambda dtype: jd.AlignedMTL(),
    "AlignedMTL, rmse": lambda dtype: jd.AlignedMTL(PREFERENCES.to(dtype), scale_mode="rmse"),
    "IMTLG": lambda dtype: jd.IMTLG(),
    "Krum": lambda dtype: jd.Krum(0, n_selected=2),
    "FairGrad": lambda dtype: jd.FairGrad(alpha=1.0),
    "ConFIG": lambda dtype: jd.ConFIG(),
    "ConFIG, preferring": lambda dtype: jd.ConFIG(PREFERENCES.to(dtype)),
}
PASSING = {
    "NashMTL": lambda dtype: jd.NashMTL(n_tasks=4),
    "TrimmedMean": lambda dtype: jd.TrimmedMean(1),
    "GradDrop": lambda dtype: jd.GradDrop(),
    "Mean": lambda dtype: jd.Mean(),
    "Random": lambda dtype: jd.Random(),
    "Constant": lambda dtype: jd.Constant(PREFERENCES.to(dtype)),
}
every_method = pytest.mark.parametrize("name", {**ACCELERATED, **PASSING})
pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem"),
]


@pytest.fixture(autouse=True)
def _off_again():
    yield
    restore()


def make(name: str, dtype: torch.dtype = torch.float32):
    return {**ACCELERATED, **PASSING}[name](dtype)


class Network(nn.Module):
    """A trunk with a channel-last weight and a scalar among its parameters, and four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 6, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(6 * 36, 16)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.heads = nn.ModuleList(nn.Linear(16, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.linear(torch.relu(self.convolution(x)).flatten(1)))

    def trunk(self) -> list[Tensor]:
        return [*self.convolution.parameters(), *self.linear.parameters(), self.gain]


def train(name: str, steps: int, **settings) -> tuple[Network, list[Tensor | None]]:
    """Trains as a user of TorchJD would write it."""
    torch.manual_seed(0)
    network, aggregator = Network(), make(name)
    # FairGrad's update has one length whatever the gradients': a larger step would leap about the minimum.
    lr = 0.002 if name == "FairGrad" else 0.05
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(3, (4, 16))
    given = []
    for _ in range(steps):
        features = network(x)
        losses = [
            nn.functional.cross_entropy(head(features), target) for head, target in zip(network.heads, y, strict=True)
        ]
        autojac.mtl_backward(losses, features=features)
        given.append(autojac.jac_to_grad(network.trunk(), aggregator, **settings))
        optimizer.step()
        optimizer.zero_grad()
    return network, given


@every_method
def test_twenty_steps_end_at_the_same_parameters(name):
    plain, weights = train(name, 20)
    with accelerate():
        fast, accelerated = train(name, 20)
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4 if name == "CAGrad" else 1e-5)
    for one, other in zip(weights, accelerated, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and one.shape == other.shape)


@pytest.mark.parametrize("name", [name for name in ACCELERATED if not name.startswith("ConFIG")])
def test_with_optimized_gramians(name):
    plain, _ = train(name, 20, optimize_gramian_computation=True)
    with accelerate():
        fast, _ = train(name, 20, optimize_gramian_computation=True)
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4 if name == "CAGrad" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_method
def test_on_matrices_and_gramians(name, dtype):
    theirs, mine = make(name, dtype), make(name, dtype)
    for step in range(30):
        torch.manual_seed(step)
        J = torch.randn(4, 20, dtype=dtype)
        torch.manual_seed(step)
        wanted, drawn = theirs(J), torch.rand(3)
        torch.manual_seed(step)
        with accelerate():
            got = mine(J)
        assert torch.equal(torch.rand(3), drawn)  # as many random numbers
        assert got.dtype == dtype
        scale = float(J.norm())
        tolerance = 1e-3 if name == "CAGrad" else 1e-5 if dtype == torch.float32 else 1e-6
        assert torch.allclose(got, wanted, rtol=0, atol=tolerance * scale), step
        if hasattr(theirs, "gramian_weighting") and not name.startswith("GradVac"):
            torch.manual_seed(step)
            wanted = theirs.gramian_weighting(J @ J.T)
            torch.manual_seed(step)
            with accelerate():
                got = mine.gramian_weighting(J @ J.T)
            assert got.dtype == dtype
            assert torch.allclose(got @ J, wanted @ J, rtol=0, atol=tolerance * scale)


def test_it_is_mtlfast_that_runs(monkeypatch):
    calls = []
    for name in ("gram", "solve", "combine"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, f=original, **k: calls.append(name) or f(*a, **k))
    train("UPGrad", 1)
    assert calls == []
    with accelerate():
        for name in ACCELERATED:
            calls.clear()
            train(name, 1)
            assert calls == ["gram", "solve", "combine"], name
            calls.clear()
            make(name)(torch.randn(4, 6))
            assert calls == ["gram", "solve", "combine"], name
        for name in ("NashMTL", "TrimmedMean", "GradDrop"):
            calls.clear()
            train(name, 1)
            assert "solve" not in calls, name


def test_hooks_run_and_may_change_the_weights():
    def run() -> tuple[list[str], Tensor]:
        seen = []
        torch.manual_seed(0)
        aggregator = jd.UPGrad()
        aggregator.gramian_weighting.register_forward_pre_hook(
            lambda m, given: seen.append(f"gramian {given[0].dtype}")
        )
        aggregator.gramian_weighting.register_forward_hook(lambda m, given, out: seen.append("weights") or 2 * out)
        aggregator.weighting.register_forward_hook(lambda m, given, out: seen.append(f"matrix {tuple(given[0].shape)}"))
        aggregator.register_forward_hook(lambda m, given, out: seen.append(f"vector {tuple(out.shape)}"))
        p = nn.Parameter(torch.randn(2, 3))
        autojac.backward([p.sum(), -p.square().sum(), p[0].sum()], jac_tensors=None)
        autojac.jac_to_grad([p], aggregator)
        return seen, p.grad

    seen, gradient = run()
    with accelerate():
        again, accelerated = run()
    assert again == seen == ["gramian torch.float32", "weights", "matrix (3, 6)", "vector (6,)"]
    assert torch.allclose(gradient, accelerated, atol=1e-5)


def test_errors_are_torchjds():
    p = nn.Parameter(torch.ones(3))
    cases = [
        lambda: autojac.jac_to_grad([p], jd.UPGrad()),
        lambda: jd.UPGrad()(torch.ones(3)),
        lambda: jd.UPGrad(PREFERENCES)(torch.ones(3, 5)),
        lambda: jd.Krum(2)(torch.ones(3, 5)),
        lambda: jd.AlignedMTLWeighting(scale_mode="max")(torch.eye(3)),
    ]
    for case in cases:
        messages = []
        for on in (False, True):
            with pytest.raises(ValueError) as error, accelerate() if on else _nothing():
                case()
            messages.append(str(error.value))
        assert messages[0] == messages[1]


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def test_what_differentiates_passes_through():
    J = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with accelerate():
        jd.MGDA()(J).sum().backward()
    assert J.grad is not None
    with accelerate():
        assert not jd.UPGrad()(J).requires_grad


def test_gradvac_keeps_its_state_where_torchjd_has_it():
    torch.manual_seed(0)
    plain, fast = jd.GradVac(), jd.GradVac()
    for step in range(4):
        J = torch.randn(3, 8)
        torch.manual_seed(step)
        plain(J)
        torch.manual_seed(step)
        with accelerate():
            fast(J)
    assert torch.allclose(plain.gramian_weighting._phi_t, fast.gramian_weighting._phi_t, atol=1e-5)
    later = torch.randn(3, 8)
    torch.manual_seed(9)
    wanted = plain(later)
    torch.manual_seed(9)
    assert torch.allclose(fast(later), wanted, atol=1e-4)  # TorchJD's own function goes on from it


def test_on_and_off():
    original = jd.UPGradWeighting.forward
    assert status().endswith("accelerate() is off")
    accelerate()
    assert jd.UPGradWeighting.forward is not original
    assert status().endswith("accelerate() is on")
    with accelerate():  # on before: it stays on
        pass
    assert status().endswith("accelerate() is on")
    restore()
    assert jd.UPGradWeighting.forward is original
    with pytest.raises(ZeroDivisionError), accelerate():
        raise ZeroDivisionError
    assert status().endswith("accelerate() is off")


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(face.metadata, "version", lambda name: "0.9.1")
    with pytest.raises(RuntimeError, match=r"accelerate: torchjd is 0.9.1, expected one of 0.17 and 0.18"):
        accelerate()
    assert jd.UPGradWeighting.forward.__module__.startswith("torchjd")

    def missing(name):
        raise face.metadata.PackageNotFoundError

    monkeypatch.setattr(face.metadata, "version", missing)
    with pytest.raises(ImportError, match="accelerate: there is no torchjd"):
        accelerate()
    assert status() == "not installed"


@pytest.mark.parametrize("module", ["_backward", "_mtl_backward", "_jac_to_grad", "_jac"])
def test_the_examples_of_its_documentation(module):
    module = importlib.import_module(f"torchjd.autojac.{module}")
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
    with accelerate():
        for test in finder.find(module, module.__name__):
            if test.examples:
                runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize(
    "name", ["UPGrad", "MGDA", "PCGrad", "CAGrad", "ConFIG", "AlignedMTL", "IMTLG", "Krum", "DualProj"]
)
def test_names_for_a_changed_import(name):
    arguments = {"CAGrad": (0.5,), "Krum": (0,)}.get(name, ())
    torch.manual_seed(0)
    J = torch.randn(4, 20, dtype=torch.float64)
    ours, theirs = getattr(face, name)(*arguments), getattr(jd, name)(*arguments)
    if name != "PCGrad":  # draws its orders otherwise
        tolerance = 1e-3 if name == "CAGrad" else 1e-5
        assert torch.allclose(ours(J), theirs(J), atol=tolerance)
        if name != "ConFIG":
            weighting = getattr(face, f"{name}Weighting")(*arguments)
            assert torch.allclose(weighting(J @ J.T) @ J, theirs(J), atol=tolerance)
    p = nn.Parameter(copy.deepcopy(J[0]))
    autojac.backward([p.sum(), p.square().sum(), -p[0], p[1] * p[2]])
    autojac.jac_to_grad([p], ours)  # an aggregator for TorchJD's own functions too
    assert p.grad.isfinite().all()


def test_config_is_zero_where_torchjds_is():
    # The cutoff of its pseudo-inverse is the number of columns times eps.
    J = torch.randn(2, 9_000_000)
    assert not jd.ConFIG()(J).any()
    with accelerate():
        assert not jd.ConFIG()(J).any()
    assert face.ConFIG()(J).norm() > 0.5 * J[0].norm()
