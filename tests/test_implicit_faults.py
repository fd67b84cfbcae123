"""Planted faults of the implicit way: comparisons and MTLFAST_CHECK=1 see each, and nothing is written."""

from dataclasses import replace

import pytest
import torch
from implicit_steps import WEIGHTS, Tasks, assert_exact, step
from torch import nn

import mtlfast
from mtlfast import weighting
from mtlfast.aggregation import Constant, PCGrad, UPGrad
from mtlfast.jacobian import _factored, _implicit, _plan
from mtlfast.jacobian._known_nodes import TABLE, _examples, unreadable
from mtlfast.jacobian._uses import Layer

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("every_size")]

F = nn.functional


class Trunk(nn.Module):
    """One weight and one embedding with a padding row, in a structure that `form` chooses."""

    def __init__(self):
        super().__init__()
        self.form = "once"
        self.table = nn.Embedding(24, 16, padding_idx=2)
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, indices):
        x = torch.tanh(self.table(indices) + 1)
        forms = {
            "once": lambda: torch.tanh(x) @ self.weight.T,
            "twice": lambda: torch.tanh(x @ self.weight.T) @ self.weight.T,
            "transposed": lambda: torch.tanh(x) @ self.weight,
            "by mode": lambda: x @ (self.weight.T if self.training else self.weight),
        }
        return forms[self.form]()


@pytest.fixture
def model():
    return Tasks(Trunk(), 16, 3).double()


INDICES = torch.tensor([5, 2, 5])


def losses_of(model):
    return lambda: model.losses(INDICES)


def missed_use(monkeypatch, model):
    model.trunk.form = "twice"
    found = _plan.layer_of

    def missing(parameter, column, graph):
        layer = found(parameter, column, graph)
        return replace(layer, uses=layer.uses[:1]) if isinstance(layer, Layer) else layer

    monkeypatch.setattr(_plan, "layer_of", missing)


def padding_row(monkeypatch, model):
    found = _implicit.ImplicitJacobian._factors_of
    monkeypatch.setattr(
        _implicit.ImplicitJacobian, "_factors_of", lambda self, layer: replace(found(self, layer), padding=-1)
    )


def stale_plan(before, after):
    """Plants that the uses found at the first step of a model stay, while the model changes."""

    def plant(monkeypatch, model):
        found, kept = _plan.layer_of, {}

        def stale(parameter, column, graph):
            layer = found(parameter, column, graph)
            first = kept.setdefault(column, layer)
            if not isinstance(layer, Layer):
                return layer
            uses = [
                use._replace(turned=was.turned, constant=was.constant)
                for use, was in zip(layer.uses, first.uses, strict=False)
            ]
            return replace(layer, kind=first.kind, uses=tuple(uses))

        monkeypatch.setattr(_plan, "layer_of", stale)
        before(model)
        mtlfast.backward(model.losses(INDICES), Constant([1.0] * 3), shared=model.trunk, jacobian="implicit")
        after(model)

    return plant


def wrong_gram(monkeypatch, model):
    found = _factored.products
    monkeypatch.setattr(_factored, "products", lambda *a: ((x := found(*a))[0] * 1.001, x[1]))


def form(name):
    return lambda model: setattr(model.trunk, "form", name)


def by_mode(training):
    def change(model):
        model.trunk.form = "by mode"
        model.train(training)

    return change


CHANGES = {
    "used once, then twice": (form("once"), form("twice")),
    "another orientation": (form("once"), form("transposed")),
    "training, then evaluation": (by_mode(True), by_mode(False)),
}
FAULTS = {
    "a use is missed": missed_use,
    "the padding row has a gradient": padding_row,
    "a wrong Gram matrix": wrong_gram,
    **{f"a stale plan: {name}": stale_plan(*change) for name, change in CHANGES.items()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_comparison_with_the_stored_way_sees_a_fault(monkeypatch, model, fault):
    assert_exact(losses_of(model), model, shared=model.trunk)
    FAULTS[fault](monkeypatch, model)
    with pytest.raises(AssertionError):
        assert_exact(losses_of(model), model, shared=model.trunk)


NUMBERS = r"(an update of .* that is \d[^ ]* from .*, whose norm is \d|w\^T G w = -?\d[^ ]* for .*, expected \d)"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_sees_a_fault_and_nothing_is_written(monkeypatch, model, fault):
    FAULTS[fault](monkeypatch, model)
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    model.zero_grad()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    with pytest.raises(RuntimeError, match=f"^backward: MTLFAST_CHECK found {NUMBERS}"):
        mtlfast.backward(model.losses(INDICES), Constant(WEIGHTS[:3]), shared=model.trunk, jacobian="implicit")
    assert first.grad.eq(1).all()
    assert all(p.grad is None for p in model.parameters() if p is not first)


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_stays_exact(monkeypatch, model, change, check):
    monkeypatch.setenv("MTLFAST_CHECK", check)
    for alter in (*CHANGES[change], *CHANGES[change]):
        alter(model)
        result = assert_exact(losses_of(model), model, shared=model.trunk)
        assert {layer.way for layer in result.plan.layers} == {"implicit"}
    assert len(_plan._cache[next(model.trunk.parameters())]) == 2


def test_the_check_agrees_with_groups_and_loss_weights(monkeypatch, model):
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    for options in (
        {"aggregator": UPGrad(), "groups": "tensor"},
        {"aggregator": PCGrad(), "weighting": weighting.Constant([1.0, 3.0, 0.0])},
        {"aggregator": Constant([0.0, 0.0, 0.0])},
        {"aggregator": UPGrad(), "storage_dtype": torch.float32, "precision": "exact"},
    ):
        step(losses_of(model), model, "implicit", shared=model.trunk, **options)


def version(monkeypatch):
    monkeypatch.setattr(mtlfast.jacobian._known_nodes, "_WHY", unreadable("1.13.1", _examples()))
    return "the private fields of autograd's nodes are not known for torch 1.13.1"


def a_field(monkeypatch):
    class MmBackward0:
        _saved_self = _raw_saved_self = _raw_saved_mat2 = _input_metadata = _sequence_nr = next_functions = None

    examples = {**_examples(), "MmBackward0": MmBackward0()}
    monkeypatch.setattr(mtlfast.jacobian._known_nodes, "_WHY", unreadable(torch.__version__, examples))
    return f"MmBackward0 of torch {torch.__version__} has no _saved_mat2"


def a_node(monkeypatch):
    examples = _examples()
    del examples["TBackward0"]
    monkeypatch.setattr(mtlfast.jacobian._known_nodes, "_WHY", unreadable(torch.__version__, examples))
    return f"torch {torch.__version__} makes no TBackward0"


def no_extension(monkeypatch):
    monkeypatch.setattr(mtlfast._native, "module", lambda: None)
    return "the compiled extension is needed to see hooks"


def many_nodes(monkeypatch):
    monkeypatch.setattr(mtlfast.jacobian._uses, "MOST_NODES", 5)
    monkeypatch.setattr(mtlfast.jacobian._plan, "_cache", {})
    return "the graph has more than 5 nodes"


@pytest.mark.parametrize("cause", [version, a_field, a_node, no_extension, many_nodes])
@pytest.mark.parametrize("way", ["implicit", "auto"])
def test_what_is_not_known_goes_the_ordinary_way(monkeypatch, model, cause, way):
    reason = cause(monkeypatch)
    result = assert_exact(losses_of(model), model, way, shared=model.trunk)
    assert [(layer.way, layer.reason) for layer in result.plan.layers] == [("ordinary", reason)] * 2
    assert result.plan.way == "stored"
    assert reason in str(result.plan)


def test_this_torch_is_in_the_table_and_an_unknown_one_is_not():
    assert unreadable(torch.__version__, _examples()) is None
    assert all(unreadable(f"{known}.0+cpu", _examples()) is None for known in TABLE)
    assert unreadable("3.0.0", _examples()) is not None
