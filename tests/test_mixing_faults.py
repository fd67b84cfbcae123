"""Planted faults of mixtures are caught, float32 is exact enough, failures move nothing, and what a step costs."""

import copy

import pytest
import torch
from mixing_models import MIXINGS, D, Model, S, assert_as_stored, disjoint, model, rows, step
from passes import Breaks
from peaks import peak_bytes
from test_ways_break import FailsAt, assert_unmoved, everything
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mtlfast
from mtlfast.aggregation import CRMOGM, IMTLG, MGDA, ConFIG, GramAggregator, UPGrad
from mtlfast.jacobian import _mixing, _probe, _sample_products
from mtlfast.jacobian._sample_products import RowMap
from mtlfast.weighting import FAMO

pytestmark = pytest.mark.native


class Shifted(RowMap):
    """Takes each row for that of the sample whose row is before it."""

    def by_sample(self, rows: Tensor) -> Tensor:
        return super().by_sample(rows.roll(1, 0))

    def summed(self, rows: Tensor, dim: int = 0) -> Tensor:
        return super().summed(rows.roll(1, dim), dim)

    def spread(self, of_samples: Tensor) -> Tensor:
        return super().spread(of_samples).roll(-1, 0)


def shift_rows(monkeypatch) -> None:
    """Shifts the rows of all layers by one, after the probe, which would see it."""
    made = _mixing.factors_of
    monkeypatch.setattr(_mixing, "factors_of", lambda use, rows, *given: made(use, Shifted(*rows), *given))


def keep_padding(monkeypatch) -> None:
    """Keeps the rows of padded indices."""
    monkeypatch.setattr(Tensor, "masked_fill", lambda self, mask, value: self)


def forget_a_use(monkeypatch) -> None:
    """Computes with the last use of each parameter alone."""
    made = _mixing.SampleLayer
    monkeypatch.setattr(_mixing, "SampleLayer", lambda parameter, t, uses: made(parameter, t, uses[-1:]))


def forget_cross_terms(monkeypatch) -> None:
    """Leaves the products of one use with another out."""
    cross = _sample_products._cross
    monkeypatch.setattr(
        _sample_products, "_cross", lambda x, y, dtype: cross(x, y, dtype) if x is y else torch.zeros(S, S).double()
    )


FAULTS = {
    "rows of a linear layer": (shift_rows, "MLP over tokens"),
    "rows of attention": (shift_rows, "transformer, time first"),
    "rows of a convolution": (shift_rows, "conv 2d"),
    "padding": (keep_padding, "embedding"),
    "a use of a tied table": (forget_a_use, "tied head"),
    "a use of a layer": (forget_a_use, "layers used twice"),
    "cross terms": (forget_cross_terms, "tied head"),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, monkeypatch):
    fault, of = FAULTS[name]
    net, A = model(of), MIXINGS["dense"]()
    assert_as_stored(net, A)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert_as_stored(net, A)
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    with pytest.raises(RuntimeError, match=r"MTLFAST_CHECK found .*, expected|MTLFAST_CHECK found .*; expected"):
        step(net, A, UPGrad(), "mixing")


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", ["transformer, time first", "MLP towers", "conv 1d", "tied head", "embedding", "LoRA"])
def test_the_check_finds_no_fault_where_there_is_none(name, mixing, monkeypatch):
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    step(model(name), MIXINGS[mixing](), UPGrad(), "mixing")


def test_the_check_catches_samples_that_meet(monkeypatch):
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    layers = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, affine=False), nn.Linear(D, D))
    net = Model(layers, rows(D)).double()
    net.given = net.given.double()
    rows_of = RowMap(1, S, 1)
    monkeypatch.setattr(_probe, "row_map", lambda before, after, number: (rows_of, True))
    with pytest.raises(RuntimeError, match="MTLFAST_CHECK found"):
        step(net, MIXINGS["dense"](), UPGrad(), "mixing")


def in_float32(name: str, seed: int = 0) -> nn.Module:
    net = model(name, seed).float()
    if isinstance(net, Model) and net.given.is_floating_point():
        net.given = net.given.float()
    return net


def errors(net: nn.Module, A: Tensor, losses=None) -> dict[str, float]:
    """How far G in float32 is from that in float64, as a share of the gradients' norms, by way."""
    wide = copy.deepcopy(net).double()
    if isinstance(wide, Model) and wide.given.is_floating_point():
        wide.given = wide.given.double()
    exact = step(wide, A, UPGrad(), "stored", losses, diagnostics=True).step.gram
    norms = exact.diagonal().sqrt()
    found = {}
    for way in ("mixing", "stored"):
        gram = step(net, A, UPGrad(), way, losses, diagnostics=True, precision="exact").step.gram
        found[way] = float(((gram - exact).abs() / norms.outer(norms)).nan_to_num().max())
    return found


@pytest.mark.parametrize("mixing", ["dense", "disjoint", "each sample", "more tasks than samples"])
@pytest.mark.parametrize("name", ["transformer, time first", "MLP towers", "conv 2d", "tied head", "embedding", "LoRA"])
def test_the_error_of_float32_products(name, mixing):
    found = errors(in_float32(name), MIXINGS[mixing]())
    assert found["mixing"] <= max(5e-6, 2 * found["stored"]), found


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name", ["MLP over tokens", "transformer, batch first", "embedding of a bag"])
def test_the_error_where_samples_nearly_cancel(name, apart):
    net = in_float32(name)
    if net.given.is_floating_point():
        net.given[1] = net.given[0] + apart * net.given[1]
    else:
        net.given[1] = net.given[0]

    def losses(net: nn.Module) -> Tensor:
        found = net.losses()
        return found * (1 + apart * torch.arange(S, dtype=found.dtype))

    A = torch.tensor([[1.0, -1.0, 0, 0, 0], [0, 0, 1.0, 0, 0], [1.0, -1.0, 0, 1e-3, 0]], dtype=torch.float64)
    found = errors(net, A, losses)
    assert found["mixing"] <= max(5e-6, 2 * found["stored"]), found


WIDTH = 128


@pytest.mark.parametrize("by", ["mixing", "samples", "two same samples"])
@pytest.mark.parametrize("method", [UPGrad, MGDA, IMTLG, ConFIG])
def test_the_weights_of_tasks_that_nearly_depend_on_each_other(method, by):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    net, A = Model(layers, rows(WIDTH), WIDTH), torch.randn(3, S, dtype=torch.float64)
    if by == "mixing":
        A[1] = 3e-3 * A[1] - A[0]
    else:
        net.given[1] = net.given[0] + (3e-3 * net.given[1] if by == "samples" else 0)
        A = torch.eye(S)[:3] * torch.tensor([[1.0], [-1.0 if by == "samples" else 1.0], [1.0]])
    wide = copy.deepcopy(net).double()
    wide.given = net.given.double()
    expected = step(wide, A, method(), "stored").step.weights
    got = step(net, A, method(), "mixing").step.weights
    assert float((got - expected).norm()) <= 1e-6 * float(expected.norm())


class Refuses(GramAggregator):
    """Fails when it has the Gram matrix."""

    def solve(self, gram, step):
        raise RuntimeError("planted")


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_anywhere_in_the_middle_moves_nothing(before, probed):
    net, A = model("transformer, batch first"), MIXINGS["dense"]()
    aggregator, weighting = CRMOGM(UPGrad()), FAMO(3)
    per_sample = net.losses()
    mtlfast.backward(per_sample, UPGrad(), shared=net.trunk, mixing=A, jacobian="mixing")  # torch imports what it needs
    net.zero_grad()
    if before:
        for i, parameter in enumerate(net.parameters()):
            parameter.grad = None if i % 3 == 1 else torch.ones_like(parameter)

    def run() -> None:
        mtlfast.backward(
            per_sample, aggregator, shared=net.trunk, mixing=A.abs(), jacobian="mixing", weighting=weighting
        )

    n, failures = 1, 0
    while True:
        per_sample = net.losses()
        if not probed:
            _probe._cache.clear()
        unmoved = everything(net, aggregator, weighting)
        try:
            with FailsAt(n):
                run()
            break
        except torch.OutOfMemoryError:
            assert_unmoved(unmoved, everything(net, aggregator, weighting))
            failures += 1
            n += 17 if probed else 53
    assert failures > 10


@pytest.mark.parametrize("what", ["pass", "method"])
def test_a_failing_pass_or_method_moves_nothing(what):
    net = model("MLP towers")
    for parameter in net.trunk.parameters():
        parameter.grad = torch.ones_like(parameter)
    losses = net.losses()
    losses = Breaks.apply(losses) if what == "pass" else losses
    aggregator = Refuses() if what == "method" else CRMOGM(UPGrad())
    unmoved = everything(net, aggregator)
    with pytest.raises(RuntimeError, match="planted"):
        mtlfast.backward(losses, aggregator, shared=net.trunk, mixing=disjoint(3), jacobian="mixing")
    assert_unmoved(unmoved, everything(net, aggregator))


def wide_transformer(samples: int, length: int) -> Model:
    """Two layers of width 128."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    trunk = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Model(trunk, torch.randn(samples, length, WIDTH), WIDTH)


@pytest.mark.parametrize("tasks", [2, 8, 32, "disjoint"])
@pytest.mark.parametrize(("samples", "length", "most"), [(4, 8, 1.25), (8, 16, 1.4)])
def test_flops_of_a_whole_step(samples, length, most, tasks):
    net = wide_transformer(samples, length)
    A = disjoint(2, samples) if tasks == "disjoint" else torch.randn(tasks, samples)

    def plain(losses: Tensor) -> None:
        losses.sum().backward()

    def mixed(losses: Tensor) -> None:
        made = mtlfast.backward(losses, UPGrad(), shared=net.trunk, mixing=A, jacobian="mixing")
        assert made.plan.way == "mixing"

    def counted(run) -> int:
        losses = net.losses()  # outside, because the counter's hooks would be refused
        with FlopCounterMode(display=False) as counter:
            run(losses)
            with torch.no_grad():
                net.losses()
        return counter.get_total_flops()

    mixed(net.losses())  # which probes
    ratio = counted(mixed) / counted(plain)
    assert ratio <= most, ratio


def test_samples_of_one_task_each_take_the_work_of_one_weight_gradient():
    net = wide_transformer(16, 32)  # four times as many rows as the width
    flops = {}
    for tasks in ("dense", "disjoint"):
        A = disjoint(2, 16) if tasks == "disjoint" else torch.randn(2, 16)
        for _ in range(2):
            losses = net.losses()
            with FlopCounterMode(display=False) as counter:
                mtlfast.backward(losses, UPGrad(), shared=net.trunk, mixing=A, jacobian="mixing")
        flops[tasks] = counter.get_total_flops()
    each = 2 * 16 * 32 * sum(p.numel() for p in net.trunk.parameters() if p.dim() == 2)
    assert flops["disjoint"] < 3.2 * each  # input gradients, weight gradients of tasks, and one weight gradient
    assert flops["disjoint"] < flops["dense"]


@pytest.mark.parametrize("mixing", ["dense", "disjoint"])
def test_memory_does_not_grow_with_the_tasks(mixing):
    samples = 16
    net = Model(nn.Sequential(*[nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(4)]), torch.randn(1), 512)
    net.given = torch.randn(samples, 512)
    size = sum(p.nbytes for p in net.trunk.parameters())

    def peak(tasks: int) -> int:
        A = torch.randn(tasks, samples) if mixing == "dense" else disjoint(tasks, samples)

        def run() -> None:
            net.zero_grad()
            mtlfast.backward(net.losses(), UPGrad(), shared=net.trunk, mixing=A, jacobian="mixing")

        run()
        return peak_bytes(run)

    few, many = peak(2), peak(16)
    assert many <= few + 0.1 * size
    assert many <= 1.5 * size
