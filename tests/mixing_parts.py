"""Models in which parts of parameters are used, or broadcast in any way, for tests of mixtures of samples."""

from collections.abc import Callable

import torch
from mixing_models import D, Model, S, T, image, rows
from torch import Tensor, nn


class Split(nn.Module):
    """torch's attention to a memory, which takes the matrices of its projections out of one parameter.

    Args:
        one_memory: whether keys and values are made from one tensor.
        batch_first: whether samples are the first dimension inside, too.
    """

    def __init__(self, one_memory: bool, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=batch_first)
        self.one_memory, self.batch_first = one_memory, batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        keys = x.sin()
        out = self.attention(x, keys, keys if self.one_memory else x.cos(), need_weights=False)[0]
        return out if self.batch_first else out.transpose(0, 1)


class Decoder(nn.Module):
    """torch's decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(D, D)
        self.layer = nn.TransformerDecoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=x.dtype)
        return self.layer(x, self.memory(x), tgt_mask=mask)


class Positions(nn.Module):
    """Embeddings of positions, whose entries are the same for all samples."""

    def __init__(self, positions: Callable[[], Tensor], padding_idx: int | None = None) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(T + 3, D, padding_idx), nn.Linear(D, D)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x) + self.table(self.positions())))


class Added(nn.Module):
    """A parameter that is added after a function has taken a part of it or turned it.

    Args:
        shape: that of the parameter.
        taken: what takes it.
        turned: whether samples are the second dimension.
    """

    def __init__(self, shape: tuple[int, ...], taken: Callable[[Tensor], Tensor], turned: bool = False) -> None:
        super().__init__()
        self.positions, self.linear = nn.Parameter(torch.randn(shape)), nn.Linear(D, D)
        self.taken, self.turned = taken, turned

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turned else x
        x = self.linear(x + self.taken(self.positions)) * self.taken(self.positions)
        return x.transpose(0, 1) if self.turned else x


class CommonElements(nn.Module):
    """A vector of which two parts are used that have elements in common."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.linear = nn.Parameter(torch.randn(D + 3)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + self.vector[:D]) * self.vector[3:]


class Product(nn.Module):
    """A parameter whose parts, each in some shape, are matrices."""

    def __init__(self, shape: tuple[int, ...], taken: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.weight, self.taken = nn.Parameter(torch.randn(shape)), taken

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.taken(self.weight):
            x = torch.tanh(x @ matrix)
        return x


class Labels(nn.Module):
    """An embedding of each sample's label, which scales and shifts all of its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.linear = nn.Embedding(3, D), nn.Embedding(3, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        label = torch.arange(S) % 3
        return torch.tanh(self.linear(x) * self.scale(label)[:, None] + self.shift(label)[:, None])


class SharedAttention(nn.Module):
    """One attention of torch to a memory, in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        for memory in (x.sin(), x.cos()):
            x = x + self.attention(x, memory, memory, need_weights=False)[0]
        return x


class ClassToken(nn.Module):
    """A vision transformer's way to put a token and positions before the tokens of each sample."""

    def __init__(self, repeat: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, D, 3, stride=3)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 7, D))
        self.layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True)
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        token = self.token.repeat(len(x), 1, 1) if self.repeat else self.token.expand(len(x), -1, -1)
        return self.layer(torch.cat([token, x], dim=1) + self.positions)[:, 0]


class RelativePositions(nn.Module):
    """Attention with a bias for each head and distance, looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.qkv = nn.Embedding(2 * T - 1, 2), nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        distance = torch.arange(T).unsqueeze(0) - torch.arange(T).unsqueeze(1) + T - 1
        scores = q @ k.mT + self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def trained(norm: nn.Module) -> nn.Module:
    """A BatchNorm as it is in evaluation."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


class Grouped(nn.Module):
    """Convolutions with a kernel for each channel and for each group of channels."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.layers = nn.Sequential(kind(2, 4, 3, groups=2, padding=1), nn.Tanh(), kind(4, D, 2, stride=2, groups=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).sin().flatten(2).mean(2)


class Frames(nn.Module):
    """Convolutions over the frames of all samples, with BatchNorm that has been trained and GroupNorm."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        norm = trained(nn.BatchNorm2d(4))
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Conv2d(4, D, 2), nn.GroupNorm(2, D))
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.stack([x, x.sin(), x.cos()], dim=0 if self.time_first else 1)
        out = self.layers(frames.flatten(0, 1)).flatten(2).mean(2)
        return out.view(3, S, D).transpose(0, 1) if self.time_first else out.view(S, 3, D)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "attention to one memory": lambda: Model(Split(True, True), rows(T, D)),
    "attention to one memory, time first": lambda: Model(Split(True, False), rows(T, D)),
    "attention to two memories": lambda: Model(Split(False, True), rows(T, D)),
    "decoder": lambda: Model(Decoder(), rows(T, D)),
    "positions": lambda: Model(Positions(lambda: torch.arange(T)), rows(T, D)),
    "positions with a dimension": lambda: Model(Positions(lambda: torch.arange(T).unsqueeze(0)), rows(T, D)),
    "positions of each sample": lambda: Model(Positions(lambda: torch.arange(T).expand(S, T)), rows(T, D)),
    "positions with repetition and padding": lambda: Model(Positions(lambda: torch.arange(T) // 2, 0), rows(T, D)),
    "sliced positions": lambda: Model(Added((T + 3, D), lambda p: p[1 : T + 1]), rows(T, D)),
    "sliced positions with a dimension": lambda: Model(Added((1, T + 3, D), lambda p: p[:, :T]), rows(T, D)),
    "positions, time first": lambda: Model(Added((T, 1, D), lambda p: p, turned=True), rows(T, D)),
    "sliced positions, time first": lambda: Model(Added((T + 1, 1, D), lambda p: p[:T], turned=True), rows(T, D)),
    "a table of scales": lambda: Model(Added((3, D), lambda p: p[2]), rows(T, D)),
    "a turned table": lambda: Model(Added((D, T, 1), lambda p: p.permute(2, 1, 0)), rows(T, D)),
    "chunks of a vector": lambda: Model(Added((2 * D,), lambda p: p.chunk(2)[1]), rows(T, D)),
    "slices with common elements": lambda: Model(CommonElements(), rows(T, D)),
    "a view as a matrix": lambda: Model(Product((D * D,), lambda w: [w.view(D, D)]), rows(D)),
    "slices as matrices": lambda: Model(Product((2 * D, D), lambda w: [w[:D], w[D:].mT]), rows(T, D)),
    "slices of a turned matrix": lambda: Model(Product((D, 2 * D), lambda w: list(w.T.split(D))), rows(D)),
    "a stack of matrices": lambda: Model(Product((3, D, D), lambda w: [*w.unbind(), w[0]][:3]), rows(D)),
    "a slice used twice": lambda: Model(Product((D + 2, D), lambda w: [w[:D]] * 2), rows(D)),
    "labels": lambda: Model(Labels(), rows(T, D)),
    "one attention in two layers": lambda: Model(SharedAttention(), rows(T, D)),
    "class token": lambda: Model(ClassToken(False), image(2)),
    "class token, repeated": lambda: Model(ClassToken(True), image(2)),
    "relative positions": lambda: Model(RelativePositions(), rows(T, D)),
    "BatchNorm in evaluation": lambda: Model(trained(nn.BatchNorm1d(D)), rows(D)),
    "grouped convolutions": lambda: Model(Grouped(2), image(2)),
    "grouped convolutions over one dimension": lambda: Model(Grouped(1), image(1)),
    "frames": lambda: Model(Frames(False), image(2)),
    "frames, time first": lambda: Model(Frames(True), image(2)),
}
