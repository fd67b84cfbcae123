"""Sparse gradients of shared embeddings: G by their common indices, and a sparse `.grad`."""

import warnings

import pytest
import torch
from elementwise import METHODS as ELEMENT_WISE
from peaks import peak_bytes
from torch import Tensor, nn
from unusual import METHODS, check_step

import mtlfast
from mtlfast import _grad
from mtlfast.aggregation import Aggregator, PCGrad, Sum
from mtlfast.jacobian._sparse import held_dense

STATELESS = {**METHODS, "Median": ELEMENT_WISE["Median"].make, "Agreeing": ELEMENT_WISE["Agreeing"].make}
ROWS, WIDTH = 40, 3


class Net(nn.Module):
    """A shared table and a shared layer. Task k looks up its own ids, some of which other tasks look up too."""

    def __init__(self, num_tasks: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, sparse=True)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(num_tasks))
        self.ids = [torch.randint(0, ROWS, (9,)) for _ in range(num_tasks)]
        self.to(dtype)

    def losses(self) -> list[Tensor]:
        features = [self.layer(self.table(ids)).tanh() for ids in self.ids]
        return [(head(x) - 1).square().mean() for head, x in zip(self.heads, features, strict=True)]

    @property
    def shared(self) -> list[nn.Parameter]:
        return [self.table.weight, *self.layer.parameters()]


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", STATELESS)
def test_a_step_is_that_of_dense_gradients(name, num_tasks):
    net = Net(num_tasks)
    for _ in range(2):
        check_step(STATELESS[name], net.losses(), net.shared, 1e-9, diagnostics=True)
        assert net.table.weight.grad.is_sparse
        assert not net.layer.weight.grad.is_sparse


def test_tasks_with_the_same_ids():
    net = Net(3)
    net.ids = [torch.tensor([7, 2, 2, 30])] * 3
    check_step(METHODS["PCGrad"], net.losses(), net.shared, 1e-9)
    grad = net.table.weight.grad
    assert grad.is_coalesced()
    assert grad.indices().tolist() == [[2, 7, 30]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Sum", "PCGrad", "Median"])
def test_smaller_dtypes(name, dtype):
    net = Net(3, dtype)
    for _ in range(2):  # the second step adds to a sparse .grad, which torch cannot in 16 bits
        check_step(STATELESS[name], net.losses(), net.shared, 1e-4 if dtype == torch.float32 else 5e-2)
        assert net.table.weight.grad.is_sparse


def test_a_table_of_another_dtype_than_the_layer():
    net = Net(3)
    net.table.bfloat16()

    def losses():
        features = [net.layer(net.table(ids).double()).tanh() for ids in net.ids]
        return [(head(x) - 1).square().mean() for head, x in zip(net.heads, features, strict=True)]

    check_step(METHODS["PCGrad"], losses(), net.shared, 1e-2, diagnostics=True)
    assert net.table.weight.grad.dtype == torch.bfloat16


def test_an_embedding_bag():
    bag, head = nn.EmbeddingBag(ROWS, WIDTH, sparse=True, mode="sum").double(), nn.Linear(WIDTH, 2).double()
    features = head(bag(torch.randint(0, ROWS, (5, 4))))
    check_step(METHODS["PCGrad"], [features[:, 0].mean(), features[:, 1].square().mean()], [bag.weight], 1e-9)
    assert bag.weight.grad.is_sparse


def test_a_task_that_does_not_reach_the_table_and_one_without_ids():
    net = Net(4)
    net.ids[1] = torch.tensor([], dtype=torch.int64)
    losses = net.losses()
    losses[1] = net.table(net.ids[1]).sum() + net.layer.weight.sum()
    losses[2] = net.layer.weight.square().sum()
    check_step(METHODS["PCGrad"], losses, net.shared, 1e-9, diagnostics=True)
    assert net.table.weight.grad.is_sparse


def test_nobody_has_ids():
    net, nothing = Net(2), torch.tensor([], dtype=torch.int64)
    losses = [net.table(nothing).sum() + net.layer.weight.sum(), 2 * net.table(nothing).sum()]
    result = check_step(Sum, losses, net.shared[:2], 1e-9, diagnostics=True)
    assert net.table.weight.grad._nnz() == 0
    assert result.gram.tolist() == [[WIDTH**2, 0], [0, 0]]


@pytest.mark.parametrize("name", ["PCGrad", "Median"])
def test_one_tasks_gradient_is_dense(name):
    net = Net(3)
    losses = net.losses()
    losses[1] = losses[1] + net.table.weight.square().sum()
    check_step(STATELESS[name], losses, net.shared, 1e-9)
    assert not net.table.weight.grad.is_sparse


@pytest.mark.parametrize("before", ["none", "sparse", "dense"])
@pytest.mark.parametrize("made", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["PCGrad", "Median"])
def test_adding_to_what_is_there(name, made, before):
    net = Net(3)
    if before == "sparse":
        net.table(torch.tensor([1, 1, 5])).sum().backward()
    if before == "dense":
        net.table.weight.grad = torch.randn_like(net.table.weight)
    losses = net.losses()
    if made == "dense":
        losses[0] = losses[0] + net.table.weight.square().sum()
    check_step(STATELESS[name], losses, net.shared, 1e-9)
    assert net.table.weight.grad.is_sparse == (made == "sparse" and before != "dense")


class Sparse(torch.autograd.Function):
    """Passes a parameter on; its gradient is the sparse tensor that is given."""

    @staticmethod
    def forward(ctx, parameter, gradient):
        ctx.gradient = gradient
        return torch.zeros(())

    @staticmethod
    def backward(ctx, g):
        return ctx.gradient, None


def drawn(sparse_dims: int, number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A sparse gradient [4, 3, 5] at `number` indices, of which some may be there twice."""
    indices = torch.stack([torch.randint(0, size, (number,)) for size in (4, 3, 5)[:sparse_dims]])
    values = torch.randn(number, *(4, 3, 5)[sparse_dims:], dtype=dtype)
    return torch.sparse_coo_tensor(indices, values, (4, 3, 5), check_invariants=True)


@pytest.mark.parametrize("sparse_dims", [1, 2, 3])
@pytest.mark.parametrize("name", ["PCGrad", "Median"])
def test_several_sparse_dimensions(name, sparse_dims):
    p = nn.Parameter(torch.zeros(4, 3, 5, dtype=torch.float64))
    gradients = [drawn(sparse_dims, number) for number in (7, 1, 4)]
    check_step(STATELESS[name], [Sparse.apply(p, g) for g in gradients], [p], 1e-9)
    assert p.grad.sparse_dim() == sparse_dims
    assert torch.equal(p.grad.indices(), p.grad.clone().coalesce().indices())
    check_step(STATELESS[name], [Sparse.apply(p, drawn(3, 2))], [p], 1e-9)  # added to what may have other dimensions


def test_gradients_that_differ_in_their_sparse_dimensions():
    p = nn.Parameter(torch.zeros(4, 3, 5, dtype=torch.float64))
    check_step(METHODS["PCGrad"], [Sparse.apply(p, drawn(dims, 4)) for dims in (1, 2)], [p], 1e-9)
    assert not p.grad.is_sparse


def test_what_a_function_keeps_is_left_alone():
    p = nn.Parameter(torch.zeros(4, 3, 5, dtype=torch.float64))
    kept = drawn(1, 6).coalesce()
    values = kept.values().clone()
    mtlfast.backward([Sparse.apply(p, kept), Sparse.apply(p, kept)], Sum(), shared=[p])
    assert torch.equal(p.grad.to_dense(), 2 * kept.to_dense())
    p.grad.coalesce().values().zero_()
    assert torch.equal(kept.values(), values)


def test_what_a_function_keeps_is_left_alone_beside_the_shared_parameters():
    p, own = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4, 3, 5, dtype=torch.float64))
    kept = drawn(1, 6)
    mtlfast.backward([p.sum() + Sparse.apply(own, kept), p.sum()], Sum(), shared=[p])
    assert torch.equal(own.grad.to_dense(), kept.to_dense())
    assert own.grad._values().data_ptr() != kept._values().data_ptr()


def test_other_layouts_are_refused_by_name():
    with warnings.catch_warnings(action="ignore"):  # torch calls this layout a beta
        p = nn.Parameter(torch.eye(4)[:, :3].to_sparse_csr())
        losses = [Sparse.apply(p, p.detach().clone()) for _ in range(2)]
    with pytest.raises(ValueError, match=r"backward: the gradient of shared 0 has layout torch\.sparse_csr, expected"):
        mtlfast.backward(losses, Sum(), shared=[p])
    assert p.grad is None


def test_the_four_sums():
    a, b = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    for x in (a, a.to_sparse(1), a.to_sparse(2)):
        for y in (b, b.to_sparse(1), b.to_sparse(2)):
            total = _grad.plus(x, y)
            assert torch.equal(total.to_dense(), a + b)
    for dtype in (torch.bfloat16, torch.float16):
        total = _grad.plus(a.to(dtype).to_sparse(1), b.to(dtype).to_sparse(1))
        assert total.dtype == dtype
        assert torch.equal(total.to_dense(), a.to(dtype) + b.to(dtype))


class Fails(Aggregator):
    """It fails after the backward passes."""

    def aggregate(self, grads, **context):
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("before", ["none", "sparse", "dense"])
def test_a_failure_leaves_grad_as_it_was(before, monkeypatch):
    net = Net(2)
    if before == "sparse":
        net.table(torch.tensor([1, 5])).sum().backward()
    if before == "dense":
        net.table.weight.grad = torch.ones_like(net.table.weight)
    was = net.table.weight.grad
    value = None if was is None else was.to_dense().clone()

    def unchanged() -> bool:
        return net.table.weight.grad is was and (was is None or torch.equal(was.to_dense(), value))

    with pytest.raises(RuntimeError, match="in the middle"):
        mtlfast.backward(net.losses(), Fails(), shared=net.shared)
    assert unchanged()
    real, calls = _grad.prepared, []

    def fails_late(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # the heads and one part are prepared
            raise RuntimeError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(_grad, "prepared", fails_late)
    with pytest.raises(RuntimeError, match="out of memory"):
        mtlfast.backward(net.losses(), Sum(), shared=net.shared)
    assert unchanged()
    assert net.layer.weight.grad is None


def test_state_by_parameter_is_told_that_the_rows_are_no_whole_parameters():
    seen = []

    class Looks(Aggregator):
        def aggregate(self, grads, **context):
            seen.append((grads.parameters, grads.shapes))
            return [torch.zeros(shape, dtype=grads.dtype) for shape in grads.shapes]

    net = Net(2)
    net.ids = [torch.tensor([3, 1]), torch.tensor([1, 9])]
    mtlfast.backward(net.losses(), Looks(), shared=net.shared)
    assert seen == [(None, ((3, WIDTH), (WIDTH, WIDTH), (WIDTH,)))]


def test_sparse_optimizers_train():
    net = Net(3)
    sparse, dense = torch.optim.SparseAdam([net.table.weight], lr=0.05), torch.optim.SGD(net.layer.parameters(), 0.05)
    first = sum(net.losses()).item()
    untouched = sorted(set(range(ROWS)) - set(torch.cat(net.ids).tolist()))
    before = net.table.weight.detach().clone()
    for _ in range(20):
        sparse.zero_grad()
        dense.zero_grad()
        mtlfast.backward(net.losses(), PCGrad(), shared=net.shared)
        sparse.step()
        dense.step()
    assert sum(net.losses()).item() < first / 2
    assert torch.equal(net.table.weight[untouched], before[untouched])


def test_tasks_that_touch_all_places_are_not_copied():
    gradients = [drawn(1, 9).coalesce() for _ in range(2)]
    gradients[1] = torch.sparse_coo_tensor(
        gradients[0].indices(), gradients[0].values(), (4, 3, 5), check_invariants=True
    ).coalesce()
    held = held_dense([gradients[0], None, gradients[1]])
    assert held.gradients[1] is None
    assert [g.data_ptr() for g in held.gradients[::2]] == [g._values().data_ptr() for g in gradients]


class First(Aggregator):
    """An element-wise method that takes no memory: the first task's gradient."""

    def aggregate(self, grads, out, **context):
        for target, gradient in zip(out, grads.rows[0], strict=True):
            target.copy_(gradient)


@pytest.mark.native
@pytest.mark.parametrize("same", [True, False], ids=["the same ids", "ids of each task"])
@pytest.mark.parametrize("make", [METHODS["PCGrad"], First])
def test_memory_is_in_the_order_of_the_touched_rows(make, same):
    num_tasks, number, width = 8, 4096, 16
    table = nn.Embedding(1_000_000, width, sparse=True)
    ids = [torch.randint(0, 1_000_000, (number,)) for _ in range(1 if same else num_tasks)]
    losses = [table(of_task).square().sum() for of_task in (ids * num_tasks if same else ids)]
    most = peak_bytes(lambda: mtlfast.backward(losses, make(), shared=[table.weight]))
    touched = table.weight.grad._nnz()
    assert touched <= number * len(ids)
    held = num_tasks * touched * width * 4  # the K rows
    assert held < most < 3 * held
