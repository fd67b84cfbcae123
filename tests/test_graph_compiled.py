"""What the walk of the graph says of compiled functions, whose backward pass may run only once."""

from collections.abc import Callable, Iterator

import pytest
import torch
from test_graph import walk  # noqa: F401
from torch import Tensor, nn

from mtlfast.jacobian._graph import reached_by


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh().sin()
        return self.first(h).sum(), self.second(h).square().sum()


@pytest.fixture
def donated_buffer() -> Iterator[Callable[[bool], None]]:
    """Sets whether a function that is compiled donates its buffers to its backward pass, and brings that back."""
    config = torch._functorch.config
    before = config.donated_buffer
    yield lambda value: setattr(config, "donated_buffer", value)
    config.donated_buffer = before
    torch._dynamo.reset()


def passes_fail(losses: list[Tensor], retain_graph: bool) -> bool:
    """Runs one backward pass for each loss and says whether one failed because of donated buffers."""
    parameters = reached_by(losses).leaves
    for k, loss in enumerate(losses):
        keep = retain_graph or k + 1 < len(losses)
        try:
            torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
        except RuntimeError as error:
            if "donated" in str(error):
                return True
            raise
    return False


@pytest.mark.parametrize("at_compilation", [True, False])
@pytest.mark.parametrize("at_run", [True, False])
@pytest.mark.parametrize("earlier", ["no pass", "a plain pass", "a retained pass"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_compiled_model_admits_retained_passes_or_not(donated_buffer, at_compilation, at_run, earlier, dynamic):
    torch._dynamo.reset()
    donated_buffer(at_compilation)
    net, x = torch.compile(Net(), backend="aot_eager", dynamic=dynamic), torch.ones(2, 3)
    if earlier == "a plain pass":
        sum(net(x)).backward()
    elif earlier == "a retained pass":
        passes_fail(list(net(x)), retain_graph=True)
    losses = list(net(x))
    donated_buffer(at_run)
    why = reached_by(losses).once()
    donated_buffer(at_run or at_compilation)  # with False torch lets a pass read what another has overwritten
    assert (why is not None) == passes_fail(losses, retain_graph=False)
    assert why is None or "donated_buffer = False" in why


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # by torch.compile, of its input
@pytest.mark.parametrize("retain_graph", [True, False])
def test_a_compiled_head_that_only_the_last_loss_reaches_runs_once(donated_buffer, retain_graph):
    torch._dynamo.reset()
    donated_buffer(True)
    trunk = nn.Linear(3, 4)
    heads = [  # which differ, because torch.compile makes one function of modules that do not
        torch.compile(nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 1)), backend="aot_eager")
        for between in (nn.Tanh(), nn.Sigmoid())
    ]
    heads[1](trunk(torch.ones(2, 3))).sum().backward()
    h = trunk(torch.ones(2, 3))
    losses = [head(h).sum() for head in heads]
    assert (reached_by(losses).once(retain_graph) is not None) == retain_graph
    assert reached_by(losses[::-1]).once() is not None
    assert passes_fail(losses, retain_graph) == retain_graph
    assert reached_by([trunk(torch.ones(2, 3)).sum()] * 2).once(True) is None
