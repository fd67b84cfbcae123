"""What a probe compares bit for bit, and what is too small for that."""

import pytest
import torch
from mixing_models import S, TiedHead, assert_as_stored, step
from torch import Tensor, nn

from mtlfast.aggregation import UPGrad
from mtlfast.jacobian._probe import factors_for, row_map
from mtlfast.jacobian._sample_products import RowMap

pytestmark = pytest.mark.native


def language_model(seed: int) -> nn.Module:
    """One with logits so far apart that the least likely words have a gradient below the normal float32 numbers."""
    torch.manual_seed(seed)
    return TiedHead(torch.randint(50, (S, 16)), 50, 64)


@pytest.mark.parametrize("seed", range(3))
def test_the_tail_of_a_softmax_is_no_meeting_of_samples(seed):
    net = language_model(seed)
    assert 0 < smallest_probability(net) < torch.finfo(torch.float32).tiny
    assert_as_stored(net, torch.randn(3, S), 1e-5)
    step(net.bfloat16(), torch.randn(3, S), UPGrad(), "mixing")


def smallest_probability(net: nn.Module) -> float:
    """That is not 0 in float32."""
    with torch.no_grad():
        x = net.trunk["attention"](net.trunk["table"](net.ids))
        probabilities = (x @ net.trunk["table"].weight.T).softmax(-1)
    return float(probabilities[probabilities > 0].min())


@pytest.mark.parametrize("share", [1.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_that_meet_behind_such_a_softmax_are_refused(dtype, share):
    net = language_model(0).to(dtype)

    def losses(net: nn.Module) -> Tensor:
        found = net.losses().float()
        return found + share * found.square().mean()

    with pytest.raises(ValueError, match="samples meet"):
        step(net, torch.randn(3, S), UPGrad(), "mixing", losses)


def probe(dtype: torch.dtype, alter, size: float = 1.0) -> RowMap | None:
    """The map found for gradients [3 S, 4], in which each sample has three rows that stand together."""
    torch.manual_seed(0)
    before, after = (size * torch.randn(3 * S, 4)).to(dtype), []
    tail = torch.finfo(dtype).tiny / 3
    before[:, 2] = tail
    for i in range(2):
        factors = factors_for(S, [dtype], i)
        x = before * factors.repeat_interleave(3).unsqueeze(1).to(dtype)
        after.append((alter(x, tail), factors))
    return row_map(before, after, S)[0]


def rounded(x: Tensor, tail: float) -> Tensor:
    x[:, 2] *= 1.25
    return x


def of_a_large_one(x: Tensor, tail: float) -> Tensor:
    x[4, 0] *= 1 + torch.finfo(x.dtype).eps
    return x


def of_a_small_one(x: Tensor, tail: float) -> Tensor:
    x[4, 2] = 2.0**-50
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_differences_of_what_is_too_small_are_ignored(dtype):
    assert probe(dtype, rounded) == RowMap(1, S, 3)
    assert probe(dtype, of_a_large_one) is None
    assert probe(dtype, of_a_small_one) is None


def test_float16_has_no_numbers_that_are_too_small():
    assert probe(torch.float16, lambda x, tail: x) == RowMap(1, S, 3)
    assert probe(torch.float16, rounded) is None


def test_small_gradients_of_a_whole_layer_are_compared():
    assert probe(torch.float32, rounded, 2.0**-80) is None
