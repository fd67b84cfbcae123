"""Trunks of many kinds that keep the shape of their input, for the ways that look at a graph."""

import torch
from implicit_steps import mlp
from torch import nn
from torch.utils.checkpoint import checkpoint


class Called(nn.Module):
    """Modules, and a function of them and the input."""

    def __init__(self, call, *modules):
        super().__init__()
        self.modules_, self.call = nn.ModuleList(modules), call

    def forward(self, x):
        return self.call(self.modules_, x)


def encoder(**options):
    return nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, **options)


def rnn(kind):
    return Called(lambda m, x: m[0](x)[0], kind(32, 32, batch_first=True))


# Trunks [N, T, 32] -> [N, T, 32].
TRUNKS = {
    "MLP": lambda: mlp(32, 3),
    "MLP without biases": lambda: mlp(32, 3, bias=False),
    "wide and narrow": lambda: nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32)),
    "few rows behind many": lambda: Called(
        lambda m, x: x + m[1](m[0](x).mean((0, 1), keepdim=True)),
        nn.Linear(32, 32),
        nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32)),
    ),
    "LoRA": lambda: Called(
        lambda m, x: m[0](x) + m[2](m[1](x)),
        nn.Linear(32, 32).requires_grad_(False),
        nn.Linear(32, 2),
        nn.Linear(2, 32),
    ),
    "one weight twice": lambda: Called(lambda m, x: m[0](torch.tanh(m[0](x))), nn.Linear(32, 32)),
    "a weight in two forms": lambda: Called(lambda m, x: torch.tanh(m[0](x)) @ m[0].weight + x, nn.Linear(32, 32)),
    "one input for several": lambda: Called(
        lambda m, x: sum(f(x).tanh() for f in m), *(nn.Linear(32, 32) for _ in range(3))
    ),
    "encoder layer": encoder,
    "encoder layer, norm first": lambda: encoder(norm_first=True),
    "decoder layer": lambda: Called(
        lambda m, x: m[0](x, x), nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True)
    ),
    "attention": lambda: Called(lambda m, x: m[0](x, x, x)[0], nn.MultiheadAttention(32, 4, batch_first=True)),
    "LSTM": lambda: rnn(nn.LSTM),
    "GRU": lambda: rnn(nn.GRU),
    "convolution": lambda: Called(lambda m, x: m[1](m[0](x.mT).mT), nn.Conv1d(32, 32, 3, padding=1), nn.Linear(32, 32)),
    "checkpointed": lambda: Called(lambda m, x: checkpoint(m[0], x, use_reentrant=False), mlp(32, 3)),
    "checkpointed, with dropout": lambda: Called(
        lambda m, x: checkpoint(m[0], x, use_reentrant=False),
        nn.Sequential(nn.Linear(32, 32), nn.Dropout(), mlp(32, 2)),
    ),
    "in-place activations": lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 32)),
}
