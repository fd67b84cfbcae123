"""Backward passes that tests look at: counted, or planted to fail."""

import torch


class Counted(torch.autograd.Function):
    """The identity; `Counted.passes` is how often its backward pass ran."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Counted.passes += 1
        return g


class Breaks(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("planted")
