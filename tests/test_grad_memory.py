"""A gradient's memory becomes `.grad` only if nothing else needs it."""

import pytest
import torch
from peaks import peak_bytes
from torch import Tensor, nn

import mtlfast
from mtlfast import _grad
from mtlfast.aggregation import PCGrad, Sum

pytestmark = pytest.mark.native


def peak_over_parameters(trunk: nn.Module, x: Tensor, num_tasks: int) -> float:
    """The allocator's peak of a step, in sizes of the trunk."""
    heads = [nn.Linear(4, 1) for _ in range(num_tasks)]
    features = trunk(x)
    features = (features[0] if isinstance(features, tuple) else features)[..., :4]
    losses = [head(features).square().mean() for head in heads]
    most = peak_bytes(lambda: mtlfast.backward(losses, PCGrad(), shared=trunk.parameters()))
    return most / sum(p.numel() * p.element_size() for p in trunk.parameters())


class Attention(nn.Module):
    """Self-attention, whose projections' gradients are views as well."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("num_tasks", [2, 4])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)]), (4, 512)),
        (lambda: nn.Sequential(*[Attention(256) for _ in range(6)]), (2, 4, 256)),
    ],
    ids=["Linear", "MultiheadAttention"],
)
def test_a_step_holds_the_task_gradients_and_no_copy(make, shape, num_tasks):
    assert peak_over_parameters(make(), torch.randn(shape), num_tasks) < num_tasks + 0.5


def test_a_linears_gradients_become_grad():
    trunk, head = nn.Linear(8, 6), nn.Linear(6, 1)
    features = trunk(torch.randn(3, 8))
    rows = [torch.autograd.grad(head(features).mean() * k, [trunk.weight], retain_graph=True) for k in (1, 2)]
    assert rows[0][0]._is_view()
    assert _grad.exclusive(rows) == [True]
    mtlfast.backward([head(features).mean(), head(features).square().mean()], Sum(), shared=trunk.parameters())
    assert trunk.weight.grad._base is None
    trunk.zero_grad(set_to_none=False)
    assert not trunk.weight.grad.any()


class ViewOfSaved(torch.autograd.Function):
    """Its gradient is a view of a tensor that the graph keeps."""

    @staticmethod
    def forward(ctx, p, kept):
        ctx.kept = kept
        return (p * kept.view(p.shape)).sum()

    @staticmethod
    def backward(ctx, g):
        return ctx.kept.view(2, 3), None


def test_a_view_of_what_a_function_saved_is_left_alone():
    p = nn.Parameter(torch.zeros(2, 3))
    kept = torch.arange(6.0)
    mtlfast.backward([ViewOfSaved.apply(p, kept), ViewOfSaved.apply(p, kept)], Sum(), shared=[p])
    assert torch.equal(p.grad.flatten(), 2 * torch.arange(6.0))
    assert torch.equal(kept, torch.arange(6.0))


def test_a_gradient_that_a_hook_keeps_is_left_alone():
    trunk, kept = nn.Linear(4, 3), []
    trunk.weight.register_hook(lambda g: kept.append(g) or g)
    features = trunk(torch.randn(2, 4))
    losses = [features.mean(), features.square().mean()]
    mtlfast.backward(losses, Sum(), shared=trunk.parameters(), retain_graph=True)
    first = [g.clone() for g in kept]
    wanted = torch.autograd.grad(sum(losses), trunk.weight)[0]
    assert torch.allclose(trunk.weight.grad, wanted)
    assert torch.allclose(first[0] + first[1], wanted)
    assert trunk.weight.grad.data_ptr() not in [g.data_ptr() for g in kept]


def test_gradients_that_are_parts_of_one_tensor_are_left_alone():
    # The gradients of cat's operands are views of one tensor: neither has its memory for itself.
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4))
    losses = [(torch.cat([p, q]) * c).sum() for c in (torch.arange(7.0), torch.ones(7))]
    mtlfast.backward(losses, Sum(), shared=[p, q])
    assert torch.equal(torch.cat([p.grad, q.grad]), torch.arange(7.0) + 1)
    assert p.grad.untyped_storage().data_ptr() != q.grad.untyped_storage().data_ptr()
