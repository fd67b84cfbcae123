"""mtlfast.backward raises one sentence for what does not fit, and has written nothing then."""

import pytest
import torch
from torch import nn

import mtlfast
from mtlfast.aggregation import Sum


class Net(nn.Module):
    """A trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(2))

    def losses(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [head(self.trunk(x)).mean() for head in self.heads]


NET, X = Net(), torch.randn(2, 4)


def call(losses=None, aggregator=None, shared=None):
    return lambda: mtlfast.backward(
        NET.losses(X) if losses is None else losses,
        aggregator or Sum(),
        shared=NET.trunk.parameters() if shared is None else shared,
    )


p0 = nn.Parameter(torch.ones(2))
BAD = [
    (
        call(aggregator=torch.mean),
        TypeError,
        "backward: aggregator is a builtin_function_or_method, expected a mtlfast.aggregation.Aggregator",
    ),
    (call(losses=[]), ValueError, "backward: got 0 losses, none of them present, expected at least one"),
    (
        call(losses=[None, None]),
        ValueError,
        "backward: got 2 losses, none of them present, expected at least one",
    ),
    (call(losses=[p0.sum(), p0 * 2]), ValueError, "backward: loss 1 has shape [2], expected a scalar"),
    (
        call(losses=p0.sum()),
        ValueError,
        "backward: losses is a tensor of shape [], expected [K] or a list of scalars",
    ),
    (
        call(losses=[p0.sum(), 1.0]),
        TypeError,
        "backward: loss 1 is a float, expected a scalar Tensor or None",
    ),
    (
        call(losses=[p0.sum(), torch.ones(())]),
        ValueError,
        "backward: loss 1 does not require grad, expected one that depends on parameters, or None for a task that is "
        "absent",
    ),
    (call(shared=p0), TypeError, "backward: shared is a Tensor, expected a list of parameters"),
    (call(shared=[p0, "p"]), TypeError, "backward: shared 1 is a str, expected a parameter"),
    (
        call(shared=[p0 * 2]),
        ValueError,
        "backward: shared 0 is the result of an operation, expected a parameter (a leaf tensor)",
    ),
    (
        call(shared=[p0, nn.Parameter(torch.ones(1)), p0]),
        ValueError,
        "backward: shared 2 is the same parameter as shared 0, expected each once",
    ),
    (
        call(shared=iter([])),
        ValueError,
        "backward: shared has no parameters, expected at least one (a generator is empty after its first use)",
    ),
    (
        call(shared=[p0]),
        ValueError,
        "backward: the losses reach none of the 1 shared parameters, expected at least one",
    ),
]


@pytest.mark.parametrize(("run", "error", "message"), BAD, ids=[message[10:60] for *_, message in BAD])
def test_one_sentence_and_nothing_written(run, error, message):
    with pytest.raises(error) as raised:
        run()
    assert str(raised.value) == message
    assert all(p.grad is None for p in [*NET.parameters(), p0])
