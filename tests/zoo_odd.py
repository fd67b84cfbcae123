"""What models do beside layers: hooks, losses of several depths, odd tensors, functions in Python, derivatives."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Model, construction, randn, three_losses, with_losses
from zoo_products import Weights


class Net(nn.Module):
    """Three linear layers. `visit` gets the output of the middle one, and may return another in its place."""

    def __init__(self, visit: Callable[[Tensor], object] = lambda y: None) -> None:
        super().__init__()
        self.low, self.middle, self.high = nn.Linear(9, 9), nn.Linear(9, 10), nn.Linear(10, 9)
        self.visit = visit

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.low(x).tanh())
        found = self.visit(y)
        return self.high((found if isinstance(found, Tensor) else y).tanh())


def net(visit: Callable[[Tensor], object] = lambda y: None) -> Model:
    return with_losses(Net(visit), randn(3, 9))


@construction("low.weight high.weight", sweep="sequential", middle__weight="has a hook")
def hook_at_an_output() -> Model:
    return net(lambda y: y.register_hook(lambda g: 2 * g))


@construction("low.weight high.weight", middle__weight="has a hook")
def retained_gradient_of_an_output() -> Model:
    return net(lambda y: y.retain_grad())


@construction("low.weight high.weight", middle__weight="has a hook")
def hook_before_a_node() -> Model:
    return net(lambda y: y.grad_fn.register_prehook(lambda gs: tuple(3 * g for g in gs)))


@construction("low.weight high.weight", middle__weight="has a hook")
def hook_after_a_node() -> Model:
    return net(lambda y: y.grad_fn.register_hook(lambda gs, _: tuple(None if g is None else g.cos() for g in gs)))


@construction("low.weight middle.weight high.weight", sweep="sequential")
def hook_above_a_layer() -> Model:
    def visit(y: Tensor) -> Tensor:
        y = y * 1
        y.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return y

    return net(visit)


@construction("low.weight middle.weight", high__weight="has a hook")
def hook_between_a_parameter_and_its_layer() -> Model:
    trunk, x = Net().double(), randn(3, 9)

    def losses() -> list[Tensor]:
        turned = trunk.high.weight.T
        turned.register_hook(lambda g: g.sin())
        y = trunk.middle(trunk.low(x).tanh())
        return three_losses(torch.addmm(trunk.high.bias, y, turned))

    return Model(trunk, losses)


@construction("low.weight high.weight", middle__weight="it has a tensor hook")
def hook_at_a_parameter() -> Model:
    model = net()
    model.shared.middle.weight.register_hook(lambda g: g.sign())
    return model


@construction("low.weight middle.weight high.weight", sweep="sequential")
def module_hooks() -> Model:
    model = net()
    model.shared.middle.register_full_backward_pre_hook(lambda _, gs: (2 * gs[0],))
    model.shared.middle.register_full_backward_hook(lambda _, inputs, gs: (inputs[0] / 3,))
    model.shared.high.register_forward_hook(lambda _, x, y: y + 0.1 * x[0][:, :9])
    model.shared.middle.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    return model


class Squared(torch.autograd.Function):
    """x @ w squared, by hand."""

    @staticmethod
    def forward(ctx, x, w):
        y = x @ w
        ctx.save_for_backward(x, w, y)
        return y.square()

    @staticmethod
    def backward(ctx, g):
        x, w, y = ctx.saved_tensors
        g = 2 * y * g
        return g @ w.T, x.T @ g


@construction("low.weight high.weight", sweep="sequential", middle__weight="uses it")
def a_function_in_python() -> Model:
    trunk, x = Net().double(), randn(3, 9)

    def losses() -> list[Tensor]:
        y = Squared.apply(trunk.low(x).tanh(), trunk.middle.weight.t()) + trunk.middle.bias
        return three_losses(trunk.high(y))

    return Model(trunk, losses)


def from_parts(losses: Callable[[Net, Tensor], list[Tensor | None]], *others: nn.Module, rows: int = 3) -> Model:
    trunk, x = Net().double(), randn(rows, 9)
    return Model(trunk, lambda: losses(trunk, x), [other.double() for other in others])


@construction("low.weight middle.weight high.weight", sweep="batched")
def losses_of_several_depths() -> Model:
    def losses(net: Net, x: Tensor) -> list[Tensor]:
        low = net.low(x).tanh()
        middle = net.middle(low).tanh()
        return [low.exp().sum(), middle.square().sum() + low.sin().sum(), net.high(middle).cos().sum()]

    return from_parts(losses)


@construction("low.weight middle.weight high.weight")
def tasks_of_separate_layers() -> Model:
    def losses(net: Net, x: Tensor) -> list[Tensor]:
        return [net.low(x).exp().mean(), net.middle(x).square().sum(), net.high(F.pad(x, (0, 1))).sin().sum()]

    return from_parts(losses)


@construction("low.weight middle.weight high.weight", sweep="batched")
def a_trunk_weight_in_a_head() -> Model:
    heads = nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 4), nn.Linear(9, 2)]).double()

    def losses(net: Net, x: Tensor) -> list[Tensor]:
        y = net(x)
        first = F.linear(heads[0](y).tanh(), net.low.weight)
        return [first.square().mean(), heads[1](y).sin().sum(), heads[2](y).square().sum()]

    return from_parts(losses, heads, rows=2)


@construction("low.weight high.weight", low__bias="is no matrix")
def frozen_parameters() -> Model:
    model = net()
    model.shared.middle.requires_grad_(False)
    model.shared.high.bias.requires_grad_(False)
    return model


@construction("low.weight middle.weight high.weight")
def parameters_with_odd_strides() -> Model:
    model = net()
    model.shared.low.weight = nn.Parameter(randn(9, 9).t())
    model.shared.middle.weight = nn.Parameter(randn(20, 18)[::2, ::2])
    return model


@construction("low.weight middle.weight high.weight")
def expanded_gradients() -> Model:
    def losses(net: Net, x: Tensor) -> list[Tensor]:
        y = net(x)
        return [y.sum(), y.mean(), y.sum(0)[0]]

    return from_parts(losses)


@construction("low.weight middle.weight high.weight")
def an_empty_batch() -> Model:
    return from_parts(lambda net, x: [net(x).sum(), net(x).square().sum(), net(x).exp().sum()], rows=0)


@construction("low.weight", middle__weight="no task reaches it")
def a_layer_that_no_task_reaches() -> Model:
    return from_parts(lambda net, x: [net.low(x).sum(), net.low(x[:0]).sum(), net.low(x).sin().sum()], rows=2)


@construction("", **{f"{name}__weight": "two forms" for name in ("low", "middle", "high")})
def an_input_gradient_as_a_loss() -> Model:
    """The second loss is of a derivative, whose graph holds products of the backward pass."""

    def losses(net: Net, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = net(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return [y.square().sum(), slope.square().sum(), y.sin().sum()]

    return from_parts(losses, rows=1)


@construction("low.weight high.weight", middle__weight="complex128")
def complex_activations() -> Model:
    def losses(net: Net, x: Tensor) -> list[Tensor]:
        low = torch.fft.fft(net.low(x))
        return three_losses(net.high((low @ net.middle.weight.T.to(torch.complex128)).abs()))

    return from_parts(losses)


@construction("low.weight middle.weight high.weight")
def sparse_inputs() -> Model:
    def losses(net: Net, x: Tensor) -> list[Tensor]:
        chosen = torch.sparse_coo_tensor([[0, 1, 2], [3, 0, 8]], x[0, :3], (3, 9), check_invariants=True)
        return three_losses(net.high(net.low(x).tanh() @ torch.eye(9, 10).double() + chosen @ net.middle.weight.T))

    return from_parts(losses)


@construction("w0")
def sparse_gradients() -> Model:
    trunk, x = Weights(lambda x, w: x @ w, (9, 8)), randn(3, 9)
    places = torch.tensor([[0, 7], [2, 2], [1, 0]])
    return Model(trunk, lambda: three_losses(torch.gather(trunk(x), 1, places, sparse_grad=True)))


@construction("embedding.weight", linear__weight="fewer FLOPs")
def one_index_many_times() -> Model:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(40, 6), nn.Linear(6, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.embedding(ids).tanh())

    return with_losses(Bag(), torch.tensor([[1, 1, 1, 1, 1, 39, 1, 1, 1, 0]]))


@construction("0.weight", **{"1__weight": "fewer FLOPs"})
def a_layer_of_width_1() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 1), nn.Flatten(0)), randn(2, 8))
