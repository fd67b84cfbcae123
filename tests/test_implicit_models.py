"""The implicit way beside the stored one on models of many constructions: G, the update, and what the plan says."""

import copy

import pytest
import torch
import torch._functorch.config
import zoo_layers  # noqa: F401  adds its constructions, as do the others
import zoo_networks  # noqa: F401
import zoo_odd  # noqa: F401
import zoo_products  # noqa: F401
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import (
    CONSTRUCTIONS,
    Model,
    assert_gradients_close,
    assert_gram_close,
    assert_planned,
    randn,
    step,
    three_losses,
    with_losses,
)

import mtlfast
from mtlfast.aggregation import MGDA, CAGrad, PCGrad, UPGrad

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("every_size")]
METHODS = {"PCGrad": lambda: PCGrad(order="fixed"), "UPGrad": UPGrad, "MGDA": MGDA, "CAGrad": lambda: CAGrad(c=0.5)}


@pytest.mark.whole
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_a_construction_has_the_gram_matrix_and_the_update_of_the_stored_way(name):
    construction = CONSTRUCTIONS[name]
    stored, expected = step(construction.make, "stored")
    implicit, got = step(construction.make, "implicit")
    assert_gram_close(implicit.gram, stored.gram)
    assert_gradients_close(got, expected)
    assert_planned(construction, implicit)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["linear", "embedding", "self_attention", "gru", "losses_of_several_depths"])
def test_whole_methods_make_the_same_step(name, method):
    make = CONSTRUCTIONS[name].make
    stored, expected = step(make, "stored", METHODS[method]())
    implicit, got = step(make, "implicit", METHODS[method]())
    assert implicit.plan.way == "implicit"
    torch.testing.assert_close(implicit.weights, stored.weights, rtol=1e-9, atol=1e-9)
    assert_gradients_close(got, expected, 1e-9)


class TwoParts(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(9, 9), between, nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_submodule_takes_the_ordinary_way():
    torch._dynamo.reset()
    inner = nn.Sequential(nn.Linear(9, 9), nn.Tanh())

    def construct() -> Model:
        with torch._functorch.config.patch(donated_buffer=False):
            compiled = torch.compile(copy.deepcopy(inner).double(), backend="aot_eager")
            model = with_losses(TwoParts(compiled), randn(3, 9))
            losses = model.losses()
        return Model(model.shared, lambda: losses)

    stored, expected = step(construct, "stored")
    implicit, got = step(construct, "implicit")
    torch._dynamo.reset()
    assert_gram_close(implicit.gram, stored.gram)
    assert_gradients_close(got, expected)
    ways = {layer.name: layer for layer in implicit.plan.layers}
    assert [ways[f"{name}.weight"].way for name in ("first", "last")] == ["implicit"] * 2
    inside = ways["between._orig_mod.0.weight"]
    assert inside.way == "ordinary"
    assert "CompiledFunctionBackward uses it" in inside.reason
    assert implicit.plan.sweep == "sequential"


@pytest.mark.parametrize("way", ["implicit", "auto"])
def test_reentrant_checkpoints_are_refused(way):
    trunk, x = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9)), torch.randn(3, 9, requires_grad=True)
    losses = three_losses(checkpoint(trunk, x, use_reentrant=True))
    with pytest.raises(ValueError, match="expected use_reentrant=False"):
        mtlfast.backward(losses, PCGrad(), shared=trunk, jacobian=way)
    assert all(p.grad is None for p in (x, *trunk.parameters()))


# Of sqrt(G_ii G_jj), and of the update's norm. The stored way rounds each gradient to the dtype.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(dtype, autocast) for dtype in TOLERANCES for autocast in (False, True) if not (autocast and dtype.itemsize == 4)],
)
def test_other_dtypes_and_autocast(dtype, autocast):
    def construct() -> Model:
        trunk = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).to(torch.float32 if autocast else dtype)
        x = torch.randn(3, 16).to(trunk[0].weight.dtype)

        def losses() -> list[Tensor]:
            with torch.autocast("cpu", dtype, enabled=autocast):
                y = trunk(x)
            return three_losses(y.float())

        return Model(trunk, losses)

    stored, expected = step(construct, "stored")
    implicit, got = step(construct, "implicit")
    assert {layer.name for layer in implicit.plan.layers if layer.way == "implicit"} == {"0.weight", "2.weight"}
    assert_gram_close(implicit.gram, stored.gram, TOLERANCES[dtype])
    assert_gradients_close(got, expected, TOLERANCES[dtype])
