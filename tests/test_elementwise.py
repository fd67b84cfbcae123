"""Every element-wise aggregator: its promises, its memory, its state. The rows are in elementwise.py."""

import pytest
import torch
from cases import draw_rows
from elementwise import EQUIVARIANT, METHODS, SCALE_FREE, STATEFUL, stacked, state_of
from torch import nn

import mtlfast
from mtlfast import TaskGradients
from mtlfast._arguments import shared_parameters
from mtlfast._losses import present_losses
from mtlfast.aggregation import Aggregator, Median, Reads, Step, TrimmedMean
from mtlfast.jacobian import Jacobian, StoredJacobian
from mtlfast.weighting import Constant

SHAPES = [(4, 5), (), (0,), (7,)]
every_method = pytest.mark.parametrize("name", METHODS)


def promising(promise: str):
    return pytest.mark.parametrize("name", [name for name, method in METHODS.items() if promise in method.promises])


def direction(name: str, rows) -> list[torch.Tensor | None]:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    return METHODS[name].make()(TaskGradients.from_rows(rows, parameters), losses=torch.ones(len(rows)))


@promising(EQUIVARIANT)
def test_another_order_of_the_tasks_gives_the_same_direction(name):
    rows = draw_rows(3, SHAPES, missing=0.2)
    for a, b in zip(direction(name, rows), direction(name, rows[::-1]), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-6)


@promising(SCALE_FREE)
def test_a_constant_factor_goes_through(name):
    rows = draw_rows(3, SHAPES)
    scaled = [[1024 * g for g in row] for row in rows]
    for a, b in zip(direction(name, rows), direction(name, scaled), strict=True):
        assert torch.equal(1024 * a, b)


@every_method
def test_no_gradient_is_a_gradient_of_zeros(name):
    rows = draw_rows(3, SHAPES, missing=0.4)
    full = [[torch.zeros(s) if g is None else g for g, s in zip(row, SHAPES, strict=True)] for row in rows]
    for a, b in zip(direction(name, rows), direction(name, full), strict=True):
        assert torch.equal(torch.zeros_like(b) if a is None else a, b)


class Net(nn.Module):
    """Two trunk parameters, one of which a step may leave out, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(3)) for _ in range(2))
        self.heads = nn.ParameterList(torch.randn(3) for _ in range(2))

    def losses(self, first: bool = True) -> list[torch.Tensor]:
        features = self.second * (self.first if first else 1)
        return [(head * features).square().sum() for head in self.heads]


@every_method
def test_backward_writes_the_direction_and_plain_gradients(name):
    net = Net()
    shared = [net.first, net.second]
    losses = net.losses()
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    plain = torch.autograd.grad(sum(losses), list(net.heads), retain_graph=True)
    wanted = METHODS[name].make()(TaskGradients.from_rows(rows, shared), losses=torch.stack(losses).detach())
    result = mtlfast.backward(losses, METHODS[name].make(), shared=shared)
    assert result.weights is None
    assert result.gram is None
    assert all(torch.allclose(p.grad, w) for p, w in zip([*shared, *net.heads], [*wanted, *plain], strict=True))


@promising(STATEFUL)
def test_state_stays_with_its_parameter_when_a_step_reaches_others(name):
    net, aggregator = Net(), METHODS[name].make()
    shared = [net.first, net.second]
    whole = mtlfast.backward(net.losses(), aggregator, shared=shared)
    assert whole.weights is None
    # `second` alone is reached: it must meet its own state, which is another than first's, and leave first's alone.
    kept, before = state_of(aggregator, net.first), state_of(aggregator, net.second)
    net.zero_grad()
    losses = net.losses(first=False)
    total = torch.autograd.grad(sum(losses), net.second, retain_graph=True)[0]
    mtlfast.backward(losses, aggregator, shared=shared)
    assert net.first.grad is None
    assert all(map(torch.equal, state_of(aggregator, net.first), kept))
    assert not all(map(torch.equal, state_of(aggregator, net.second), before))
    if name == "Momentum":
        assert torch.allclose(net.second.grad, (before[0] + total) / 2)


def test_the_columns_are_all_shared_parameters_reached_or_not():
    seen = []

    class Looks(Aggregator):
        def aggregate(self, grads, step, out):
            seen.append((grads.parameters, grads.shapes))
            for target in out:
                if target is not None:
                    target.zero_()

    net = Net()
    shared = [net.first, net.second]
    for first in (True, False):
        mtlfast.backward(net.losses(first), Looks(), shared=shared)
    (whole, shapes), (some, some_shapes) = seen
    assert [id(p) for p in whole] == [id(p) for p in some] == [id(p) for p in shared]
    assert shapes == ((3,), (3,))
    assert some_shapes == (None, (3,))


def test_the_direction_becomes_grad_without_a_copy():
    addresses = []

    class Fills(Aggregator):
        def aggregate(self, grads, step, out):
            addresses.extend(target.data_ptr() for target in out)
            for target in out:
                target.fill_(1)

    net = Net()
    mtlfast.backward(net.losses(), Fills(), shared=[net.first, net.second])
    assert [p.grad.data_ptr() for p in (net.first, net.second)] == addresses
    mtlfast.backward(net.losses(), Fills(), shared=[net.first, net.second])
    assert net.first.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([torch.ones(3)], "Returns: aggregate returned 1 tensors, expected 2"),
        ([torch.ones(3), torch.ones(2)], r"Returns: aggregate returned shape \[2\] for tensor 1, expected \[3\]"),
        (3, "Returns: aggregate returned a int, expected a list of tensors or None"),
        ([None, torch.ones(3)], r"Returns: aggregate returned None for tensor 0, expected \[3\]"),
    ],
)
def test_what_is_no_direction_is_refused_and_nothing_written(returned, message):
    class Returns(Aggregator):
        def aggregate(self, grads, **context):
            return returned

    net = Net()
    with pytest.raises((ValueError, TypeError), match=message):
        mtlfast.backward(net.losses(), Returns(), shared=[net.first, net.second])
    assert all(p.grad is None for p in net.parameters())


class WithoutRows(StoredJacobian):
    """A Jacobian that gives products alone and never holds the task gradients."""

    no_rows = Jacobian.no_rows
    rows = Jacobian.rows
    put = Jacobian.put


@every_method
def test_a_jacobian_without_rows_is_refused_before_it_computes_anything(name):
    net = Net()
    jacobian = WithoutRows(present_losses(net.losses()), shared_parameters([net.first, net.second]))
    aggregator = METHODS[name].make()
    assert aggregator.reads in (Reads.ROWS, Reads.STATE)
    with pytest.raises(TypeError, match="needs the task gradients themselves, but a WithoutRows does not"):
        aggregator.check(Step(2), jacobian)
    with pytest.raises(TypeError, match="rows: expected task gradients in memory, but a WithoutRows"):
        jacobian.rows()
    with pytest.raises(TypeError, match="put: expected a direction made of task gradients, but a WithoutRows"):
        jacobian.put([None, None])


class WritesLast(Aggregator):
    """Twice the sum of the gradients; `prepare` leaves all writing to what it returns."""

    moved = 0

    def aggregate(self, grads, step, out):
        raise AssertionError("prepare stands in its place")

    def prepare(self, grads, step, out):
        sums = [None if x is None else 2 * stacked(grads, t).sum(0) for t, x in enumerate(out)]

        def finish():
            self.moved += 1
            for target, value in zip(out, sums, strict=True):
                if target is not None:
                    target.copy_(value)

        return finish


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("storage_dtype", [None, torch.float64])
def test_a_direction_may_be_written_when_all_memory_is_there(existing, storage_dtype):
    net, plain, method = Net(), Net(), WritesLast()
    plain.load_state_dict(net.state_dict())
    if existing:
        for parameter in [*net.parameters(), *plain.parameters()]:
            parameter.grad = torch.ones_like(parameter)
    mtlfast.backward(net.losses(), method, shared=[net.first, net.second], storage_dtype=storage_dtype)
    for factor, parameters in ((2, [plain.first, plain.second]), (1, list(plain.heads))):
        (factor * sum(plain.losses())).backward(inputs=parameters)
    assert method.moved == 1
    for mine, expected in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_a_step_that_fails_before_the_writes_leaves_what_a_method_writes_last():
    net, method = Net(), WritesLast()
    net.first.grad = torch.ones(()).expand(net.first.shape)  # which cannot be added to
    with pytest.raises(RuntimeError, match="expanded tensor"):
        mtlfast.backward(net.losses(), method, shared=[net.first, net.second])
    assert method.moved == 0


@pytest.mark.parametrize("left_out", ["absent", "weight of 0", "reaches nothing"])
def test_a_task_that_is_left_out_counts_no_zeros(left_out):
    w, head = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    last = {"absent": None, "weight of 0": 9 * w.sum(), "reaches nothing": head.sum()}[left_out]
    weighting = Constant([1.0, 1.0, 1.0, 0.0 if left_out == "weight of 0" else 1.0])
    mtlfast.backward([w.sum(), 2 * w.sum(), 4 * w.sum(), last], Median(), shared=[w], weighting=weighting)
    assert w.grad.item() == 2
    if left_out == "reaches nothing":
        rows = [[torch.ones(1)], [torch.full((1,), 2.0)], [torch.full((1,), 4.0)], [None]]
        assert Median()(TaskGradients.from_rows(rows))[0].item() == 2


def test_a_method_that_fits_all_tasks_alone_refuses_fewer():
    w = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="TrimmedMean: "):
        mtlfast.backward(
            [w.sum(), 2 * w.sum(), 4 * w.sum()], TrimmedMean(1), shared=[w], weighting=Constant([1.0, 1.0, 0.0])
        )
    assert w.grad is None
