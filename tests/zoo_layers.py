"""Layers that models are made of, each as a trunk: products, embeddings, normalisations, convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Model, construction, randn, three_losses, with_losses


@construction("0.weight 2.weight", sweep="batched")
def linear() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 10)), randn(3, 8))


@construction("0.weight 2.weight", **{"0__bias": "is no matrix", "1__weight": "is no matrix"})
def layer_norm() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 10)), randn(3, 8))


@construction("0.weight 1.weight")
def linear_without_bias() -> Model:
    layers = nn.Sequential(nn.Linear(8, 9, bias=False), nn.Linear(9, 10, bias=False))
    return with_losses(layers, randn(3, 8))


@construction("0.weight 2.weight")
def linear_over_tokens() -> Model:
    return with_losses(nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)), randn(2, 3, 12))


@construction("0.weight", **{"0__bias": "is no matrix"})
def linear_of_a_transposed_input() -> Model:
    return with_losses(nn.Sequential(nn.Linear(12, 16)), randn(12, 3).t())


@construction("0.weight")
def linear_of_one_vector() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 9, bias=False)), randn(8))


@construction("weight", sweep="sequential")
def linear_used_three_times() -> Model:
    layer, x = nn.Linear(16, 16).double(), randn(2, 16)

    def losses() -> list[Tensor]:
        high = layer(layer(layer(x).tanh()).tanh())
        return [*three_losses(high)[:2], layer(x).exp().mean()]

    return Model(layer, losses)


@construction("0.weight 2.weight")
def rms_norm() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 9), nn.RMSNorm(9), nn.Linear(9, 10)), randn(3, 8))


@construction("0.weight 2.weight")
def group_norm() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 10), nn.GroupNorm(2, 10), nn.Linear(10, 9)), randn(3, 8))


@construction("0.weight 2.weight", sweep="batched")
def batch_norm_in_training() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10), nn.Linear(10, 9)), randn(4, 8))


@construction("0.weight 2.weight", sweep="batched")
def batch_norm_in_evaluation() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10), nn.Linear(10, 9)).eval(), randn(4, 8))


@construction("2.weight", sweep="sequential", **{"0__weight": "is no matrix"})
def conv1d_below() -> Model:
    layers = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 16))
    return with_losses(layers, randn(2, 2, 6))


@construction("2.weight", sweep="sequential", **{"0__weight": "is no matrix"})
def conv2d_below() -> Model:
    layers = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 16))
    return with_losses(layers, randn(2, 2, 5, 5))


@construction("0.weight", **{"2__weight": "is no matrix"})
def transposed_convolution_above() -> Model:
    layers = nn.Sequential(nn.Linear(8, 12), nn.Unflatten(1, (3, 2, 2)), nn.ConvTranspose2d(3, 2, 2, stride=2))
    return with_losses(layers, randn(3, 8))


class Tokens(nn.Module):
    """An embedding and a linear layer on the mean of all tokens, or on each."""

    def __init__(self, embedding: nn.Embedding, mean: bool = True) -> None:
        super().__init__()
        self.embedding, self.linear, self.mean = embedding, nn.Linear(embedding.embedding_dim, 12), mean

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).tanh()
        return self.linear(x.mean(1) if self.mean else x)


def ids(rows: int = 2, tokens: int = 4, entries: int = 10) -> Tensor:
    found = torch.randint(entries, (rows, tokens))
    found[0] = torch.tensor([3, 3, 0, entries - 2])[:tokens]
    return found


@construction("embedding.weight linear.weight", sweep="batched")
def embedding() -> Model:
    return with_losses(Tokens(nn.Embedding(10, 8)), ids())


@construction("embedding.weight linear.weight")
def embedding_with_padding() -> Model:
    return with_losses(Tokens(nn.Embedding(10, 8, padding_idx=3)), ids())


@construction("embedding.weight linear.weight")
def embedding_with_padding_of_index_0() -> Model:
    return with_losses(Tokens(nn.Embedding(10, 8, padding_idx=0)), ids())


@construction("embedding.weight linear.weight")
def embedding_with_negative_padding() -> Model:
    return with_losses(Tokens(nn.Embedding(10, 8, padding_idx=-2)), ids())


class FunctionalTokens(Tokens):
    """The same by `F.embedding`, used `times` times, each time with its own `padding_idx`."""

    def __init__(self, *padding: int | None) -> None:
        super().__init__(nn.Embedding(40, 8))
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        total = torch.zeros(2, 8)
        for i, padding in enumerate(self.padding):
            some = (ids + i).reshape(2, 2, 2)[..., : 1 + i % 2]
            total = total + F.embedding(some, self.embedding.weight, padding).sum(dim=(1, 2)).tanh()
        return self.linear(total)


@construction("embedding.weight linear.weight")
def embedding_used_three_times() -> Model:
    return with_losses(FunctionalTokens(None, None, None), ids())


@construction("embedding.weight linear.weight")
def embedding_with_one_padding_in_all_uses() -> Model:
    return with_losses(FunctionalTokens(3, 3, 3), ids())


@construction("linear.weight", embedding__weight="padding")
def embedding_with_padding_in_some_uses() -> Model:
    return with_losses(FunctionalTokens(3, None, 3), ids())


class RawTokens(Tokens):
    """The same by `torch.embedding`, which does not count a negative padding index from the end."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(torch.embedding(self.embedding.weight, ids, -2).tanh().mean(1))


@construction("embedding.weight linear.weight")
def embedding_with_a_raw_negative_padding() -> Model:
    return with_losses(RawTokens(nn.Embedding(10, 8)), ids())
