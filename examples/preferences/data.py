"""Questions, pairs of answers, and which answer each of three made-up rewards prefers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

REWARDS = ("helpful", "harmless", "concise")
TOPICS, WORDS, LONGEST = 2, 16, 7
PADDING = 0  # of tokens: after it come the words, and then the topics of questions
TOKENS = 1 + WORDS + TOPICS


class Pairs(NamedTuple):
    """S pairs of answers, and which of the two each reward prefers.

    Attributes:
        tokens: [2, S, 1 + LONGEST] the topic of the question and an answer to it, padded at its end.
        preferred: [K, S] 1 where the first answer has the higher reward, -1 where the second has it, 0 where they tie.
    """

    tokens: Tensor
    preferred: Tensor

    def at(self, places: Tensor) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.tokens[:, places], self.preferred[:, places])


class Judge:
    """Three rewards: what each word of an answer helps and does no harm, summed up, and minus the number of words.

    A word helps the more under one of the topics, and words that help tend to be harmless. Most do either, and so long
    answers are better by two rewards and worse by the third.

    Args:
        generator: draws what each word is worth.
    """

    def __init__(self, generator: torch.Generator) -> None:
        common = 0.4 + 0.6 * torch.randn(WORDS, generator=generator)
        self._helps = common + 0.7 * torch.randn(TOPICS, WORDS, generator=generator)
        self._harmless = common + 0.6 * torch.randn(WORDS, generator=generator)

    def rewards(self, topics: Tensor, answers: Tensor) -> Tensor:
        """[K, ...] for topics [...] and answers [..., LONGEST]."""
        answered = answers != PADDING
        words = (answers - 1).clamp(min=0)
        helpful = self._helps[topics.unsqueeze(-1), words] * answered
        harmless = self._harmless[words] * answered
        return torch.stack([helpful.sum(-1), harmless.sum(-1), -answered.sum(-1).float()])

    def pairs(self, number: int, generator: torch.Generator) -> Pairs:
        """New questions with pairs of answers."""
        topics = torch.randint(TOPICS, (number,), generator=generator).expand(2, number)
        words = 1 + torch.randint(WORDS, (2, number, LONGEST), generator=generator)
        lengths = torch.randint(2, LONGEST + 1, (2, number, 1), generator=generator)
        answers = torch.where(torch.arange(LONGEST) < lengths, words, PADDING)
        first, second = self.rewards(topics, answers).unbind(1)
        questions = (1 + WORDS + topics).unsqueeze(-1)
        return Pairs(torch.cat([questions, answers], dim=-1), (first - second).sign())


def losses(margins: Tensor, preferred: Tensor) -> Tensor:
    """[K] the mean Bradley-Terry loss of each reward over the pairs that it does not tie.

    Args:
        margins: [S] the score of the first answer less that of the second.
        preferred: as in `Pairs`.
    """
    of_pairs = -F.logsigmoid(preferred * margins) * preferred.abs()
    return of_pairs.sum(1) / preferred.abs().sum(1).clamp(min=1)


def mixing(margins: Tensor, preferred: Tensor) -> Tensor:
    """[K, S] the derivative of each of these losses with respect to each margin."""
    slopes = -preferred * torch.sigmoid(-preferred * margins.detach())
    return slopes / preferred.abs().sum(1, keepdim=True).clamp(min=1)
