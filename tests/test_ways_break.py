"""A step that fails anywhere, a `.grad` of any kind and hooks of any kind, in every way to get task gradients."""

import pytest
import torch
from elementwise import METHODS as ELEMENTWISE
from elementwise import STATEFUL as STATE
from passes import Breaks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from ways_of_net import WAYS, Net

import mtlfast
from mtlfast.aggregation import CRMOGM, GramAggregator, Sum, UPGrad
from mtlfast.weighting import FAMO, UW, LossWeighting


class FailsAt(TorchDispatchMode):
    """Lets the n-th operation fail that makes a tensor, as if there were no memory for it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op._schema.is_mutable:
            self.n -= 1
            if self.n == 0:
                raise torch.OutOfMemoryError("planted")
        return op(*args, **(kwargs or {}))


def everything(net: Net, *modules: nn.Module) -> list:
    """All gradients and all state, to compare later."""
    grads = [p.grad for module in (net, *modules) for p in module.parameters()]
    values = [None if g is None else g.to_dense().clone() for g in grads]
    return [grads, values, [value.clone() for module in modules for value in module.state_dict().values()]]


def assert_unmoved(before: list, after: list) -> None:
    assert all(a is b for a, b in zip(before[0], after[0], strict=True))
    for a, b in zip(before[1] + before[2], after[1] + after[2], strict=True):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(7), b.nan_to_num(7))


STATEFUL = [name for name, method in ELEMENTWISE.items() if STATE in method.promises and name != "Momentum"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", ["no .grad", ".grad", "sparse .grad"])
# The reference makes tensors in the pass that writes the state.
@pytest.mark.parametrize(
    "method", ["CRMOGM", "Median", *(pytest.param(name, marks=pytest.mark.native) for name in STATEFUL)]
)
def test_a_failure_anywhere_in_the_middle_moves_nothing(way, before, method):
    if method in STATEFUL and (way == "at_features" or before == "sparse .grad"):
        pytest.skip("the method refuses it")
    n, failures = 1, 0
    while True:
        net = Net(sparse=before == "sparse .grad")
        aggregator = CRMOGM(UPGrad()) if method == "CRMOGM" else ELEMENTWISE[method].make()
        if method in STATEFUL and n % 2:  # a step that has state behind it
            first, given = WAYS[way](net)
            mtlfast.backward(first, aggregator, **given)
            net.zero_grad()
        if before != "no .grad":
            for i, p in enumerate(net.parameters()):
                p.grad = None if i % 3 == 1 else torch.ones_like(p)
        if before == "sparse .grad":
            net.table.weight.grad = torch.ones(7, 4, dtype=torch.float64).to_sparse(1)
        weighting = FAMO(3) if n % 2 else UW(3)
        source, arguments = WAYS[way](net)
        unmoved = everything(net, aggregator, weighting)
        try:
            with FailsAt(n):
                mtlfast.backward(source, aggregator, weighting=weighting, **arguments)
            break
        except torch.OutOfMemoryError:
            assert_unmoved(unmoved, everything(net, aggregator, weighting))
            failures += 1
            n += 3
    assert failures > 10


class Refuses(GramAggregator):
    """Fails when it has the Gram matrix."""

    def solve(self, gram, step):
        raise RuntimeError("planted")


class RefusesLosses(LossWeighting):
    """Fails when it has the losses."""

    def combine(self, values, tasks):
        raise RuntimeError("planted")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["pass", "method", "weighting"])
def test_a_failing_pass_method_or_weighting_moves_nothing(way, what):
    net = Net()
    if what == "pass":
        planted = net.loss
        net.loss = lambda task, *given: (Breaks.apply if task == 2 else Tensor.clone)(planted(task, *given))
    for p in net.trunk.parameters():
        p.grad = torch.ones_like(p)
    aggregator = Refuses() if what == "method" else CRMOGM(UPGrad())
    weighting = RefusesLosses(3) if what == "weighting" else FAMO(3)
    unmoved = everything(net, aggregator, weighting)

    def run() -> None:
        source, arguments = WAYS[way](net)
        mtlfast.backward(source, aggregator, weighting=weighting, **arguments)

    with pytest.raises(RuntimeError, match="planted"):
        run()
    assert_unmoved(unmoved, everything(net, aggregator, weighting))


def of_other_strides(p: Tensor) -> Tensor:
    return torch.ones(p.shape[::-1], dtype=p.dtype).permute(*range(p.dim() - 1, -1, -1))


EXISTING = {
    "dense": torch.ones_like,
    "of other strides": of_other_strides,
    "a view of a bucket": lambda p: torch.ones(p.numel() + 3, dtype=p.dtype)[3:].view(p.shape),
    "of another layout": lambda p: torch.ones(*p.shape, 2, dtype=p.dtype)[..., 0],
}


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("way", [name for name in WAYS if name not in ("stored", "accumulated")])
@pytest.mark.parametrize("existing", EXISTING)
def test_every_way_adds_to_a_grad_in_place(way, existing):
    net, twin = Net(), Net()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        p.grad, q.grad = EXISTING[existing](p), EXISTING[existing](p).clone()
    before = [p.grad for p in net.parameters()]
    source, arguments = WAYS[way](net)
    mtlfast.backward(source, Sum(), **arguments)
    sum(twin.losses()).backward()
    assert all(p.grad is grad for p, grad in zip(net.parameters(), before, strict=True))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_a_grad_that_cannot_be_added_to(way, where):
    net = Net()
    weight = (net.trunk[0] if where == "trunk" else net.heads[0]).weight
    weight.grad = torch.ones((), dtype=torch.float64).expand(weight.shape)
    unmoved = everything(net)
    source, arguments = WAYS[way](net)
    with pytest.raises(RuntimeError, match=r"the \.grad of a parameter of shape .* is an expanded tensor"):
        mtlfast.backward(source, UPGrad(), **arguments)
    assert_unmoved(unmoved, everything(net))


@pytest.mark.parametrize("way", WAYS)
def test_hooks_may_change_a_parameter_in_place(way):
    net, twin = Net(), Net()
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.sub_(0.1 * p.grad))
    source, arguments = WAYS[way](net)
    mtlfast.backward(source, Sum(), **arguments)
    source, arguments = WAYS[way](twin)
    mtlfast.backward(source, Sum(), **arguments)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad)


@pytest.mark.parametrize("way", WAYS)
def test_a_learned_parameter_that_the_losses_reach_gets_both_gradients(way):
    net, twin = Net(), Net()
    mine, plain = UW(3).double(), UW(3).double()

    def penalised(model, weighting):
        loss = model.loss
        model.loss = lambda task, *given: loss(task, *given) + (next(weighting.parameters()).sum() if task == 1 else 0)

    penalised(net, mine)
    penalised(twin, plain)
    source, arguments = WAYS[way](net)
    mtlfast.backward(source, Sum(), weighting=mine, **arguments)
    plain(twin.losses()).backward()
    assert torch.allclose(next(mine.parameters()).grad, next(plain.parameters()).grad, rtol=1e-6)
