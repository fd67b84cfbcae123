"""What any Jacobian can be asked, and that one file alone touches `.grad`."""

import ast
from pathlib import Path

import pytest
import torch
from methods import METHODS, losses, numbers_of_tasks
from passes import Counted
from torch import Tensor, nn

import mtlfast
from mtlfast import ops
from mtlfast._arguments import shared_parameters
from mtlfast._losses import present_losses
from mtlfast.aggregation import Step
from mtlfast.jacobian import Jacobian, StoredJacobian

PACKAGE = Path(mtlfast.__file__).parent


class Net(nn.Module):
    """A trunk, a head for each task, and a leaf that several tasks share beside the trunk."""

    def __init__(self, num_tasks: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(num_tasks))
        self.temperature = nn.Parameter(torch.ones(1))

    def losses(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x).tanh()
        return [(head(features) * self.temperature - k).square().mean() for k, head in enumerate(self.heads)]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4)


def stored(net: Net, x: Tensor, loss_weights: Tensor | None = None, **settings: bool) -> StoredJacobian:
    jacobian = StoredJacobian(present_losses(net.losses(x)), shared_parameters(net.trunk), **settings)
    jacobian.obtain(loss_weights)
    return jacobian


def rows_by_hand(net: Net, x: Tensor, leaves: list[Tensor]) -> list[list[Tensor | None]]:
    return [list(torch.autograd.grad(loss, leaves, allow_unused=True)) for loss in _fresh(net, x)]


def _fresh(net: Net, x: Tensor):
    for k in range(len(net.heads)):
        yield net.losses(x)[k]


def test_making_one_computes_nothing(x):
    Counted.passes = 0
    net = Net()
    jacobian = StoredJacobian(
        present_losses([Counted.apply(loss) for loss in net.losses(x)]), shared_parameters(net.trunk)
    )
    assert (jacobian.num_tasks, Counted.passes) == (3, 0)
    jacobian.obtain()
    assert Counted.passes == 3


def test_stored_answers_are_those_of_the_rows(x):
    net = Net()
    jacobian = stored(net, x)
    leaves = list(net.trunk.parameters())
    grads = mtlfast.TaskGradients.from_rows(rows_by_hand(net, x, leaves))
    assert torch.equal(jacobian.gram(), ops.gram(grads))
    assert torch.equal(jacobian.norms(), ops.norms(grads))
    assert [id(p) for p in jacobian.rows().parameters] == [id(p) for p in leaves]
    assert jacobian.device == torch.device("cpu")


def test_write_adds_the_weighted_sum_and_plain_gradients(x):
    net, weights = Net(), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    others = [net.temperature, *net.heads.parameters()]
    rows, plain = rows_by_hand(net, x, list(net.trunk.parameters())), rows_by_hand(net, x, others)
    for time in (1, 2):
        stored(net, x).write(weights)
        for t, p in enumerate(net.trunk.parameters()):
            assert torch.allclose(p.grad, time * sum(w * row[t] for w, row in zip(weights, rows, strict=True)).float())
        for t, p in enumerate(others):
            assert torch.allclose(p.grad, time * sum(row[t] for row in plain if row[t] is not None))


def test_loss_weights_given_late_multiply_the_plain_gradients(x):
    net = Net()
    late = torch.tensor([0.5, 3.0, 0.25])
    others = [net.temperature, *net.heads.parameters()]
    plain = rows_by_hand(net, x, others)
    stored(net, x, loss_weights_later=True).write(torch.ones(3, dtype=torch.float64), late)
    for t, p in enumerate(others):
        parts = [w * row[t] for w, row in zip(late, plain, strict=True) if row[t] is not None]
        assert torch.allclose(p.grad, sum(parts))
    summed = stored(net, x)
    before = [p.grad.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="write: got loss_weights, expected None as the tasks' gradients are summed"):
        summed.write(torch.ones(3, dtype=torch.float64), late)
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))


def test_weights_of_groups_are_no_weights_of_tasks(x):
    # weights [groups, K] would be R sums to `combine`; a Jacobian takes one weight for each task or says what it got.
    net = Net()
    jacobian = stored(net, x)
    with pytest.raises(
        ValueError, match=r"write: weights has shape \[2, 3\], expected \[3\], one weight for each task"
    ):
        jacobian.write(torch.ones(2, 3, dtype=torch.float64))
    assert all(p.grad is None for p in net.parameters())


class Products(Jacobian):
    """A Jacobian that gives products alone and never holds a row, like an implicit or a distributed one."""

    plan = "products"

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.asked: list[str] = []
        self.parameters = ()

    num_tasks = property(lambda self: len(self._matrix))
    device = torch.device("cpu")

    taking_part = None

    def product_rtol(self, precision: str | None = None) -> float:
        return 1e-12

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Nothing to do."""

    def gram(self, precision: str | None = None) -> Tensor:
        self.asked.append("gram")
        return self._matrix @ self._matrix.T

    def norms(self) -> Tensor:
        self.asked.append("norms")
        return self._matrix.norm(dim=1)

    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        """Not needed here."""


@pytest.mark.parametrize("name", METHODS)
def test_every_gram_aggregator_weighs_a_jacobian_without_rows(name):
    method = METHODS[name]
    if method.cross:
        pytest.skip("two batches' products")
    (num_tasks, *_) = numbers_of_tasks(method, 4)
    matrix = torch.randn(num_tasks, 9, dtype=torch.float64)
    step = Step(num_tasks, losses(num_tasks))
    aggregator, jacobian = method.make(), Products(matrix)
    aggregator.check(step, jacobian)
    torch.manual_seed(0)
    weights, gram = aggregator.weigh(jacobian, step)
    torch.manual_seed(0)
    wanted = method.make().weights(matrix @ matrix.T, losses=step.losses, rtol=num_tasks * 1e-12)
    assert torch.allclose(weights, wanted, rtol=1e-9, atol=1e-12)
    assert jacobian.asked == [[], ["norms"], ["gram"], ["gram"]][aggregator.reads]
    assert (gram is None) == (jacobian.asked != ["gram"])


def test_one_file_touches_grad():
    # Only this file may decide whether a gradient's memory can become `.grad`.
    touching = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "grad"
                and getattr(node.value, "attr", "") != "autograd"
            ):
                touching.add(path.relative_to(PACKAGE).as_posix())
    assert {path for path in touching if not path.startswith("bench/")} == {"_grad.py"}
