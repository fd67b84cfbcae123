"""Small models whose losses are those of single samples, and a step with mixtures of these by two ways."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtlfast
from mtlfast.aggregation import Aggregator, Constant

S, T, D, WORDS = 5, 4, 8, 11  # samples, positions, width, and entries of a table


class Model(nn.Module):
    """A trunk, which is shared, and a head, which is not.

    Args:
        trunk: maps the input [S, ...] to features [S, ..., width].
        given: the input.
        width: of the features.
    """

    def __init__(self, trunk: nn.Module, given: Tensor, width: int = D) -> None:
        super().__init__()
        self.trunk, self.given = trunk, given
        self.head = nn.Linear(width, 3)

    def losses(self) -> Tensor:
        """[S]: each sample's loss."""
        out = self.head(self.trunk(self.given))
        return (out - torch.arange(3, dtype=out.dtype)).square().flatten(1).mean(1)


class Attention(nn.Module):
    """Attention of queries to a memory, by linear layers of their own."""

    def __init__(self, memory: Tensor | None, heads: int = 2, causal: bool = False, width: int = D) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.memory, self.heads, self.causal = memory, heads, causal

    def forward(self, x: Tensor) -> Tensor:
        memory = x if self.memory is None else self.memory
        q, k, v = (
            layer(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, of in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """torch's own encoder of one layer, over an embedding with positions."""

    def __init__(self, batch_first: bool, causal: bool, padded: bool = False, norm_first: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, D, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(T, D))
        self.layer = nn.TransformerEncoderLayer(
            D, 2, 2 * D, dropout=0.0, activation="gelu", batch_first=batch_first, norm_first=norm_first
        )
        self.batch_first, self.causal, self.padded = batch_first, causal, padded

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions
        x = x if self.batch_first else x.transpose(0, 1)
        mask = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1) if self.causal else None
        padding = (ids == 0).to(x.dtype).masked_fill(ids == 0, -torch.inf) if self.padded else None
        x = self.layer(x, src_mask=mask, is_causal=self.causal, src_key_padding_mask=padding)
        return x if self.batch_first else x.transpose(0, 1)


class TiedHead(nn.Module):
    """A language model whose table is also its last layer."""

    def __init__(self, ids: Tensor, words: int = WORDS, width: int = D) -> None:
        super().__init__()
        attention = Attention(None, causal=True, width=width)
        self.trunk = nn.ModuleDict({"table": nn.Embedding(words, width), "attention": attention})
        self.ids = ids

    def losses(self) -> Tensor:
        x = self.trunk["attention"](self.trunk["table"](self.ids[:, :-1]))
        logits = F.linear(x, self.trunk["table"].weight)
        return F.cross_entropy(logits.transpose(1, 2), self.ids[:, 1:], reduction="none").mean(1)


class Lora(nn.Module):
    """A frozen linear layer with a trained product of two narrow ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.low, self.high = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(D, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + F.linear(F.linear(x, self.low), self.high) * 0.5


class Scaled(nn.Module):
    """A product and a sum with parameters of all the shapes that are broadcast over samples."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x) * self.scale + self.shift


class Twice(nn.Module):
    """A layer that is used twice, with a normalisation that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(torch.tanh(self.norm(self.layer(x)))))


class FromTheLeft(nn.Module):
    """A matrix that multiplies from the left, so that the columns of its output are the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight @ x.mT).mT


class FromTheRight(nn.Module):
    """A matrix that multiplies from the right without being transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class Towers(nn.Module):
    """Two towers over one trunk, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(D, D), nn.ReLU())
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.towers[0](x) + self.towers[1](x)


class Conv(nn.Module):
    """Convolutions with GroupNorm, averaged over places."""

    def __init__(self, dims: int, **how) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.layers = nn.Sequential(
            kind(2, 4, 3, **how), nn.GroupNorm(2, 4), nn.Tanh(), kind(4, D, 2, bias=False), nn.GroupNorm(4, D)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).sin().flatten(2).mean(2)


class Mean(nn.Module):
    """The mean over the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def ids(length: int = T) -> Tensor:
    """[S, length] with repeated ones, some in one sample, and with padding."""
    found = torch.randint(1, WORDS, (S, length))
    found[0, 1] = found[0, 0]
    found[1, -2:] = 0
    return found


def rows(*shape: int) -> Tensor:
    return torch.randn(S, *shape)


def image(dims: int) -> Tensor:
    return torch.randn(S, 2, *[9, 8][:dims])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer, batch first": lambda: Model(Encoder(True, False), ids()),
    "transformer, batch first, causal": lambda: Model(Encoder(True, True, norm_first=False), ids()),
    "transformer, time first": lambda: Model(Encoder(False, False), ids()),
    "transformer, time first, causal": lambda: Model(Encoder(False, True), ids()),
    "transformer, padded": lambda: Model(Encoder(True, False, padded=True), ids()),
    "self attention": lambda: Model(Attention(None, causal=True), rows(T, D)),
    "cross attention": lambda: Model(nn.Sequential(nn.Linear(D, D), Attention(rows(T + 2, D).double())), rows(T, D)),
    "MLP": lambda: Model(nn.Sequential(nn.Linear(D, 3 * D), nn.Tanh(), nn.Linear(3 * D, D)), rows(D)),
    "MLP towers": lambda: Model(Towers(), rows(D)),
    "MLP over tokens": lambda: Model(Towers(), rows(2, T, D)),
    "conv 1d": lambda: Model(Conv(1), image(1)),
    "conv 1d, strided": lambda: Model(Conv(1, stride=2, padding=1), image(1)),
    "conv 2d": lambda: Model(Conv(2), image(2)),
    "conv 2d, strided": lambda: Model(Conv(2, stride=(2, 1), padding=(1, 2)), image(2)),
    "conv 2d, dilated": lambda: Model(Conv(2, dilation=(2, 1), padding=1), image(2)),
    "conv 2d, padding same": lambda: Model(Conv(2, padding="same"), image(2)),
    "conv 1d, padding same": lambda: Model(Conv(1, padding="same"), image(1)),
    "conv 1d, dilated": lambda: Model(Conv(1, dilation=2), image(1)),
    "embedding": lambda: Model(nn.Embedding(WORDS, D, padding_idx=0), ids(6)),
    "embedding of a bag": lambda: Model(nn.Sequential(nn.Embedding(WORDS, D), Mean(), nn.Linear(D, D)), ids(6)),
    "tied head": lambda: TiedHead(ids()),
    "LoRA": lambda: Model(nn.Sequential(Lora(), nn.Tanh(), Lora()), rows(T, D)),
    "RMSNorm": lambda: Model(nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D), nn.Linear(D, D)), rows(T, D)),
    "LayerNorm": lambda: Model(nn.Sequential(nn.LayerNorm((T, D)), nn.Linear(D, D), nn.LayerNorm(D)), rows(T, D)),
    "scales of the features": lambda: Model(Scaled(D), rows(T, D)),
    "scales of places and features": lambda: Model(Scaled(T, D), rows(T, D)),
    "scales of places": lambda: Model(Scaled(T, 1), rows(T, D)),
    "scales of all": lambda: Model(Scaled(1, 1, D), rows(T, D)),
    "one scale": lambda: Model(Scaled(), rows(T, D)),
    "one scale with a dimension": lambda: Model(Scaled(1), rows(D)),
    "layers used twice": lambda: Model(Twice(), rows(T, D)),
    "a matrix from the left": lambda: Model(FromTheLeft(), rows(D)),
    "a matrix from the right": lambda: Model(FromTheRight(), rows(D)),
}


def disjoint(tasks: int, samples: int = S) -> Tensor:
    """[S] the task of each sample."""
    return torch.arange(samples) % tasks


# A [K, S], or the task of each sample.
MIXINGS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.randn(3, S, dtype=torch.float64),
    "more tasks than samples": lambda: torch.randn(S + 2, S, dtype=torch.float64),
    "disjoint": lambda: disjoint(3),
    "a matrix of disjoint samples": lambda: F.one_hot(disjoint(2), 2).mT,
    "each sample": lambda: torch.eye(S),
    "one task": lambda: torch.ones(1, S),
    "an unused sample": lambda: torch.randn(3, S) * (torch.arange(S) != 2),
    "an unused sample, disjoint": lambda: torch.tensor([0, -1, 1, 1, 0]),
    "a task without samples": lambda: torch.randn(3, S) * (torch.arange(3) != 1).unsqueeze(1),
    "a task without samples, disjoint": lambda: torch.tensor([0, 2, 2, 0, 2]),
}


def model(name: str, seed: int = 0) -> nn.Module:
    """A model in float64, always the same for one seed."""
    torch.manual_seed(seed)
    made = MODELS[name]().double()
    if isinstance(made, Model) and made.given.is_floating_point():
        made.given = made.given.double()
    return made


class Found(NamedTuple):
    """What a step left behind: its result, and every parameter's gradient by name."""

    step: mtlfast.StepResult
    grads: dict[str, Tensor | None]


def step(net: nn.Module, A: Tensor, aggregator: Aggregator, way: str, losses=None, **more) -> Found:
    """A step of a copy of the model with mixtures A by one way."""
    net = copy.deepcopy(net)
    shared = dict(net.trunk.named_parameters())
    per_sample = net.losses() if losses is None else losses(net)
    made = mtlfast.backward(per_sample, aggregator, shared=shared, mixing=A, jacobian=way, **more)
    if way == "mixing":
        assert made.plan.way == "mixing", made.plan
    return Found(made, {name: p.grad for name, p in net.named_parameters()})


def assert_same_gram(got: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    """Up to a share of the product of the two gradients' norms."""
    norms = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= rtol * scale).all(), f"{((got - expected).abs() / scale).nan_to_num().max():.3g}"


def assert_same_grads(got: dict, expected: dict, rtol: float = 1e-12, scale: float = 0.0) -> None:
    """Up to a share of the gradient's norm, or of a scale if that is larger."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (got[name] is None), name
        if value is not None:
            limit = rtol * max(float(value.norm()), scale)
            assert float((got[name] - value).norm()) <= limit, f"{name}: {float((got[name] - value).norm()):.3g}"


def assert_as_stored(net: nn.Module, A: Tensor, rtol: float = 1e-12, aggregator=None, **more) -> Found:
    """Compares a step with the stored way's, for fixed weights if no aggregator is given."""
    tasks = len(A) if A.dim() == 2 else int(A.max()) + 1
    weights = [(-1.0) ** k * (1 + k) / 3 for k in range(tasks)]
    make = (lambda: Constant(weights)) if aggregator is None else aggregator
    found = {way: step(net, A, make(), way, diagnostics=True, **more) for way in ("mixing", "stored")}
    expected = found["stored"]
    assert_same_gram(found["mixing"].step.gram, expected.step.gram, rtol)
    norms = expected.step.gram.diagonal(dim1=-2, dim2=-1).sum(-1).max().sqrt()
    assert_same_grads(found["mixing"].grads, expected.grads, rtol, float(norms) * max(map(abs, weights)))
    return found["mixing"]
