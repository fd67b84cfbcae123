"""Products written in all forms, weights that are shared, tied, adapted or computed, and functions in Python."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn
from zoo import Model, construction, randn, three_losses, with_losses


class Weights(nn.Module):
    """Matrices `w0`, `w1`, ... and a function of these and of the input."""

    def __init__(self, compute: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = compute
        for i, shape in enumerate(shapes):
            setattr(self, f"w{i}", nn.Parameter(randn(*shape) / 3))
        self.number = len(shapes)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.compute(*inputs, *(getattr(self, f"w{i}") for i in range(self.number)))


def weights(compute: Callable[..., Tensor], x: Tensor, *shapes: tuple[int, ...], **settings: object) -> Model:
    return with_losses(Weights(compute, *shapes), x, **settings)


@construction("w0")
def x_times_w() -> Model:
    return weights(lambda x, w: x @ w, randn(3, 9), (9, 8))


@construction("w0")
def x_times_transposed_w() -> Model:
    return weights(lambda x, w: x @ w.T, randn(3, 9), (8, 9))


@construction("w0")
def w_times_x() -> Model:
    return weights(lambda x, w: w @ x, randn(9, 3), (8, 9))


@construction("w0")
def transposed_w_times_x() -> Model:
    return weights(lambda x, w: w.mT @ x, randn(9, 3), (9, 8))


@construction("w0")
def transposed_twice_and_permuted() -> Model:
    return weights(lambda x, w: x @ w.t().transpose(-1, 0).permute(-1, -2), randn(3, 9), (8, 9))


@construction("", w0="uses it", w1="uses it")
def permuted_into_its_own_order() -> Model:
    return weights(lambda x, v, w: x @ v.permute(0, 1) @ w.transpose(1, 1), randn(2, 9), (9, 9), (9, 9))


@construction("w0 w1")
def linear_by_hand() -> Model:
    return weights(lambda x, v, w: F.linear(F.linear(x, v).relu(), w), randn(3, 8), (9, 8), (8, 9))


@construction("w0", w1="two forms")
def one_matrix_in_two_orientations() -> Model:
    return weights(lambda x, v, w: (x @ v).tanh() @ w + x @ w.T, randn(3, 9), (9, 9), (9, 9))


@construction("w0")
def one_matrix_on_both_sides() -> Model:
    """w @ x and (y.T @ w.T) have the same form."""
    return weights(lambda x, w: torch.cat([(w @ x).T, x.T.sin() @ w.T]), randn(9, 2), (10, 9))


@construction("w0")
def one_matrix_in_both_operands() -> Model:
    return weights(lambda x, w: (w @ w.T) @ x, randn(2, 30), (2, 30), memory_budget=200)


@construction("", w0="two forms")
def the_square_of_a_matrix() -> Model:
    return weights(lambda x, w: (w @ w)[:3] * x, randn(3, 9), (9, 9))


@construction("w0 w1 w2")
def product_of_three_matrices() -> Model:
    return weights(lambda x, u, v, w: x @ u @ v @ w, randn(2, 9), (9, 8), (8, 7), (7, 9))


@construction("", w0="uses it")
def einsum() -> Model:
    return weights(lambda x, w: torch.einsum("bti,oi->bto", x, w), randn(2, 2, 9), (8, 9))


@construction("w0", w1="is no matrix")
def batched_products() -> Model:
    return weights(lambda x, v, w: x @ v + torch.bmm(x, w), randn(2, 2, 12), (12, 12), (2, 12, 12))


@construction("w0", w1="is a bias")
def a_matrix_as_bias() -> Model:
    return weights(lambda x, w, b: torch.addmm(b, x, w), randn(3, 9), (9, 8), (3, 8))


@construction("w1", w0="multiplies by 2")
def addmm_with_factors() -> Model:
    return weights(
        lambda x, v, w: torch.addmm(torch.addmm(x[:, :8], x, v, alpha=2), x, w, beta=0.5), randn(3, 9), (9, 8), (9, 8)
    )


@construction("w0")
def addmm_in_place() -> Model:
    return weights(lambda x, w: (x[:, :8] * 2).addmm_(x, w), randn(3, 9), (9, 8))


@construction("", w0="CopySlices uses it")
def addmm_into_a_view() -> Model:
    def compute(x: Tensor, w: Tensor) -> Tensor:
        y = x[:, :8] * 2
        y[1:].addmm_(x[1:], w)
        return y

    return weights(compute, randn(3, 9), (9, 8))


@construction("w1", w0="uses it")
def a_slice_of_a_weight() -> Model:
    return weights(lambda x, v, w: (x @ v[1:].T) @ w.T, randn(2, 9), (9, 9), (9, 8))


@construction("w0", w1="uses it")
def a_weight_penalty() -> Model:
    trunk = Weights(lambda x, v, w: (x @ v).tanh() @ w, (9, 9), (9, 8))
    x = randn(3, 9)

    def losses() -> list[Tensor]:
        first, *others = three_losses(trunk(x))
        return [first + trunk.w1.square().sum(), *others]

    return Model(trunk, losses)


class Tied(nn.Module):
    """An embedding whose weight is that of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.linear(self.embedding(ids).mean(1)).tanh(), self.embedding.weight)


@construction("linear.weight", embedding__weight="two forms, embedding and linear")
def embedding_tied_with_the_last_layer() -> Model:
    return with_losses(Tied(), torch.randint(20, (2, 4)))


@construction("0.weight")
def tied_linear_layers() -> Model:
    layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    layers[2].weight = layers[0].weight
    return with_losses(layers, randn(2, 16))


@construction("w0 w1")
def low_rank_adapters() -> Model:
    frozen = randn(16, 16)
    return weights(lambda x, a, b: F.linear(x, frozen) + F.linear(F.linear(x, a), b), randn(2, 16), (4, 16), (16, 4))


@construction("", w0="fewer FLOPs", w1="fewer FLOPs")
def merged_low_rank_adapters() -> Model:
    """The layer's weight is the sum of a frozen one and a product: each factor is the constant of the other."""
    frozen = randn(16, 16)
    return weights(lambda x, a, b: F.linear(x, frozen + b @ a), randn(3, 16), (2, 16), (16, 2))


@construction("1.weight", **{"0__parametrizations__weight__original1": "uses it"})
def weight_norm() -> Model:
    layers = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 9)), nn.Linear(9, 8))
    return with_losses(layers, randn(3, 8))


@construction("1.weight", **{"0__parametrizations__weight__original": "uses it"})
def spectral_norm() -> Model:
    layers = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 9)), nn.Linear(9, 8))
    return with_losses(layers, randn(3, 8))


@construction("1.weight", **{"0__parametrizations__weight__original": "uses it"})
def orthogonal_weight() -> Model:
    layers = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="matrix_exp", use_trivialization=False),
        nn.Linear(8, 9),
    )
    return with_losses(layers, randn(3, 8))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


@construction("1.weight", **{"0__parametrizations__weight__original": "uses it"})
def parametrization_by_hand() -> Model:
    layers = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 8))
    nn.utils.parametrize.register_parametrization(layers[0], "weight", Symmetric())
    return with_losses(layers, randn(3, 9))


@construction("0.weight")
def terms_that_cancel() -> Model:
    """Inputs are nearly the same in all rows, over which a normalisation's gradients add up to zero."""
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, eps=1e-30, affine=False))
    return with_losses(layers, 1 + 1e-3 * randn(4, 8))
