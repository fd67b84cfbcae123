"""Networks as people build them: attention, recurrent layers, residual and dense connections, autocast, checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import Model, construction, randn, three_losses, with_losses


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@construction("attention.in_proj_weight attention.out_proj.weight", sweep="batched")
def self_attention() -> Model:
    return with_losses(SelfAttention(), randn(2, 3, 16))


class CrossAttention(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x.sin()[:, :2], x.cos()[:, :2])[0]


@construction("attention.out_proj.weight", attention__in_proj_weight="uses it")
def cross_attention() -> Model:
    return with_losses(CrossAttention(), randn(2, 3, 16))


class Attention(nn.Module):
    """Queries, keys and values of one input, in `F.scaled_dot_product_attention`."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


@construction("q.weight k.weight v.weight out.weight", sweep="batched")
def scaled_dot_product_attention() -> Model:
    return with_losses(Attention(False), randn(2, 3, 16))


@construction("q.weight k.weight v.weight out.weight")
def causal_attention() -> Model:
    return with_losses(Attention(True), randn(1, 4, 16))


LAYER = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")


@construction(" ".join(LAYER), norm1__weight="is no matrix")
def encoder_layer() -> Model:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True, activation="gelu")
    return with_losses(layer, randn(2, 3, 16))


@construction(" ".join(f"layers.{i}.{name}" for i in range(2) for name in LAYER))
def encoder() -> Model:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, norm_first=True)
    return with_losses(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), randn(2, 3, 16))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        return self.layer(x, x.sin()[:, :2], tgt_mask=mask)


@construction(
    " ".join(f"layer.{name}" for name in (*LAYER, "multihead_attn.out_proj.weight")),
    layer__multihead_attn__in_proj_weight="uses it",
)
def decoder_layer() -> Model:
    return with_losses(Decoder(), randn(2, 3, 16))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.linear = kind(12, 16, batch_first=True), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer(x)[0][:, -1])


@construction("linear.weight layer.weight_ih_l0 layer.weight_hh_l0")
def lstm() -> Model:
    return with_losses(Recurrent(nn.LSTM), randn(2, 2, 12))


@construction("linear.weight layer.weight_ih_l0 layer.weight_hh_l0")
def gru() -> Model:
    return with_losses(Recurrent(nn.GRU), randn(2, 2, 12))


@construction("weight_ih weight_hh")
def recurrent_cell_in_a_loop() -> Model:
    cell, x = nn.GRUCell(12, 16).double(), randn(2, 2, 12)

    def losses() -> list[Tensor]:
        first = cell(x[0], torch.zeros(2, 16, dtype=x.dtype))
        return three_losses(cell(x[1], first))

    return Model(cell, losses)


class Residual(nn.Module):
    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.layers = nn.ModuleList(nn.Linear(10 * (i + 1 if dense else 1), 10) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = F.silu(layer(x))
            x = torch.cat([x, y], dim=1) if self.dense else x + y
        return x


@construction("layers.0.weight layers.1.weight layers.2.weight", sweep="batched")
def residual_connections() -> Model:
    return with_losses(Residual(False), randn(3, 10))


@construction("layers.0.weight layers.1.weight layers.2.weight")
def dense_connections() -> Model:
    return with_losses(Residual(True), randn(3, 10))


@construction("0.weight 2.weight 4.weight")
def activations_in_place() -> Model:
    layers = nn.Sequential(
        nn.Linear(8, 9), nn.ReLU(inplace=True), nn.Linear(9, 10), nn.SiLU(inplace=True), nn.Linear(10, 8)
    )
    return with_losses(layers, randn(3, 8))


@construction("0.weight 3.weight", sweep="batched")
def dropout() -> Model:
    return with_losses(nn.Sequential(nn.Linear(8, 9), nn.Dropout(0.4), nn.Tanh(), nn.Linear(9, 8)), randn(3, 8))


class Segments(nn.Module):
    """Two segments whose activations are computed again in the backward pass, one within the other if `nested`."""

    def __init__(self, dropout: float = 0.0, nested: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 10))
        self.second = nn.Sequential(nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 8))
        self.nested = nested

    def forward(self, x: Tensor) -> Tensor:
        if self.nested:
            return checkpoint(self._both, x, use_reentrant=False)
        return self._both(x)

    def _both(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=False), use_reentrant=False)


SEGMENTS = "first.0.weight first.3.weight second.0.weight second.2.weight"


@construction(SEGMENTS)
def checkpointed() -> Model:
    return with_losses(Segments(), randn(2, 8))


@construction(SEGMENTS)
def checkpointed_with_dropout() -> Model:
    return with_losses(Segments(0.3), randn(2, 8))


@construction(SEGMENTS)
def checkpointed_within_a_checkpoint() -> Model:
    return with_losses(Segments(0.3, nested=True), randn(2, 8))


@construction("0.weight 2.weight")
def activations_saved_on_the_cpu() -> Model:
    layers, x = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 10)).double(), randn(2, 8)

    def losses() -> list[Tensor]:
        with torch.autograd.graph.save_on_cpu():
            return three_losses(layers(x))

    return Model(layers, losses)
