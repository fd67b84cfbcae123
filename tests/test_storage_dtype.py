"""`storage_dtype`: stored task gradients in another dtype than their parameters."""

import pytest
import torch
from elementwise import METHODS as ELEMENT_WISE
from peaks import peak_bytes
from torch import Tensor, nn
from unusual import METHODS, dense_rows, matrix_of

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast._arguments import shared_parameters
from mtlfast._losses import present_losses
from mtlfast.aggregation import Aggregator, GramAggregator, PCGrad, Sum
from mtlfast.jacobian import StoredJacobian

STORED = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
STATELESS = {**METHODS, "Median": ELEMENT_WISE["Median"].make, "Agreeing": ELEMENT_WISE["Agreeing"].make}


class Net(nn.Module):
    """A trunk, and a head for each task."""

    def __init__(self, num_tasks: int, sparse: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6, sparse=sparse)
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(num_tasks))
        self.ids = [torch.randint(0, 20, (7,)) for _ in range(num_tasks)]
        self.to(dtype)

    def losses(self) -> list[Tensor]:
        return [(h(self.trunk(self.table(i))) - 1).square().mean() for h, i in zip(self.heads, self.ids, strict=True)]

    @property
    def shared(self) -> list[nn.Parameter]:
        return [self.table.weight, *self.trunk.parameters()]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 8])
@pytest.mark.parametrize("name", STATELESS)
def test_a_step_is_that_of_the_rounded_gradients(name, num_tasks, stored, sparse):
    net, make = Net(num_tasks, sparse), STATELESS[name]
    rows = [[g.to(stored).double() for g in row] for row in dense_rows(net.losses(), net.shared)]
    J = matrix_of(rows)
    for times in (1, 2):
        result = mtlfast.backward(
            net.losses(), make(), shared=net.shared, storage_dtype=stored, diagnostics=True, precision="exact"
        )
        assert torch.allclose(result.gram, J @ J.T, rtol=1e-10, atol=1e-14)
        aggregator = make()
        if isinstance(aggregator, GramAggregator):
            assert torch.allclose(result.weights, aggregator.weights(J @ J.T), rtol=1e-4, atol=1e-4)
            wanted = [torch.einsum("k,k...->...", result.weights, torch.stack(c)) for c in zip(*rows, strict=True)]
        else:
            wanted = aggregator(TaskGradients.from_rows(rows))
        for p, x in zip(net.shared, wanted, strict=True):
            assert p.grad.dtype == torch.float32
            assert p.grad.is_sparse == (sparse and p is net.table.weight)
            # Weighted sums are rounded once, to float32; an element-wise direction has the stored dtype.
            scale, eps = times * x.abs().max().item(), 1e-6 if aggregator.reads < 3 else torch.finfo(stored).eps + 1e-6
            assert torch.allclose(p.grad.to_dense().double(), times * x, rtol=eps, atol=eps * scale)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_ranks_are_decided_with_the_precision_of_the_stored_dtype(stored):
    net = Net(3)
    jacobian = StoredJacobian(present_losses(net.losses()), shared_parameters(net.shared), storage_dtype=stored)
    jacobian.obtain()
    rounded = TaskGradients.from_rows([[torch.ones(2, dtype=stored)]])
    assert jacobian.product_rtol() == ops._precision.product_rtol(rounded)
    assert {g.dtype for row in jacobian.rows().rows for g in row} == {stored}


def test_parameters_of_two_dtypes_are_stored_in_one():
    # Element-wise methods then have rows, and each .grad has the dtype of its parameter.
    a, b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(5).bfloat16())
    losses = [a.square().sum() + b.float().sum(), a.sum() - 3 * b.float().square().sum()]
    rows = [[g.bfloat16().double() for g in row] for row in dense_rows(losses, [a, b])]
    for make in (METHODS["PCGrad"], STATELESS["Median"]):
        a.grad = b.grad = None
        with pytest.raises(TypeError, match="needs the task gradients themselves, but the shared parameters are of"):
            mtlfast.backward(losses, STATELESS["Median"](), shared=[a, b], retain_graph=True)
        result = mtlfast.backward(
            losses, make(), shared=[a, b], retain_graph=True, storage_dtype=torch.bfloat16, diagnostics=True
        )
        J = matrix_of(rows)
        assert torch.allclose(result.gram, J @ J.T, rtol=1e-10)
        assert (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.bfloat16)
        if result.weights is None:
            # The direction has the stored dtype.
            wanted = [x.bfloat16().double() for x in make()(TaskGradients.from_rows(rows))]
        else:
            wanted = [torch.einsum("k,k...->...", result.weights, torch.stack(c)) for c in zip(*rows, strict=True)]
        assert torch.allclose(a.grad.double(), wanted[0], rtol=1e-6)
        assert torch.allclose(b.grad.double(), wanted[1], rtol=1e-2)


@pytest.mark.parametrize("given", [torch.int32, torch.complex64, torch.float8_e4m3fn, "bfloat16", 16])
def test_other_dtypes_are_refused_before_any_pass(given):
    net = Net(2)
    net.heads[0].weight.register_hook(lambda g: pytest.fail("a backward pass ran"))
    expected = f"backward: storage_dtype is {given}, expected float32, float64, bfloat16 or float16"
    with pytest.raises(TypeError) as raised:
        mtlfast.backward(net.losses(), Sum(), shared=net.shared, storage_dtype=given)
    assert str(raised.value) == expected


def test_a_failure_leaves_grad_as_it_was():
    class Fails(Aggregator):
        def aggregate(self, grads, **context):
            raise RuntimeError("in the middle")

    net = Net(2)
    mtlfast.backward(net.losses(), Sum(), shared=net.shared)
    before = [p.grad.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="in the middle"):
        mtlfast.backward(net.losses(), Fails(), shared=net.shared, storage_dtype=torch.bfloat16)
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))


def test_tensors_in_the_stored_dtype_are_not_copied():
    net = Net(2)
    jacobian = StoredJacobian(present_losses(net.losses()), shared_parameters(net.shared), storage_dtype=torch.float32)
    row = tuple(torch.ones(2) for _ in range(3))
    assert [id(g) for g in jacobian.keep((*row, None))] == [*(id(g) for g in row), id(None)]


def peak(trunk: nn.Module, num_tasks: int, storage_dtype: torch.dtype | None) -> float:
    """The allocator's peak of a step, in sizes of the trunk."""
    heads = [nn.Linear(4, 1) for _ in range(num_tasks)]
    features = trunk(torch.randn(4, 512))[..., :4]
    losses = [head(features).square().mean() for head in heads]
    options = {"shared": trunk, "jacobian": "stored", "storage_dtype": storage_dtype}
    most = peak_bytes(lambda: mtlfast.backward(losses, PCGrad(), **options))
    return most / sum(p.numel() * p.element_size() for p in trunk.parameters())


@pytest.mark.native
@pytest.mark.parametrize("num_tasks", [4, 8])
def test_one_set_in_the_parameters_dtype_beside_the_stored_ones(num_tasks):
    trunk = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    whole, half = peak(trunk, num_tasks, None), peak(trunk, num_tasks, torch.bfloat16)
    assert num_tasks - 0.1 < whole
    assert half < num_tasks / 2 + 1.5
