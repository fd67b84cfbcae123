"""The preference model: a small network that scores an answer to a question."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from data import PADDING, TOKENS
from torch import Tensor, nn


class Config(NamedTuple):
    """The sizes of the model.

    Attributes:
        embedding: features of a token.
        width: of a hidden layer.
        layers: hidden layers.
        tokens: how many different tokens there are.
    """

    embedding: int = 128
    width: int = 512
    layers: int = 4
    tokens: int = TOKENS


class Scorer(nn.Module):
    """The sum of the tokens' embeddings, hidden layers, and a score."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.tokens, config.embedding, padding_idx=PADDING)
        widths = [config.embedding, *[config.width] * config.layers]
        hidden = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        self.hidden = nn.Sequential(*(part for layer in hidden for part in (layer, nn.GELU())))
        self.score = nn.Linear(config.width, 1, bias=False)  # a bias would not change which answer is better

    def forward(self, tokens: Tensor) -> Tensor:
        """Margins.

        Args:
            tokens: [2, S, L] two answers to each of S questions.

        Returns:
            [S] the score of the first answer less that of the second.
        """
        both = self.words(tokens.flatten(0, 1)).sum(1)
        first, second = self.score(self.hidden(both)).view(2, -1)
        return first - second
