"""Models as people train them, in every way: recomputed activations, adapters, recurrent layers, BatchNorm, complex."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from ways import MICRO_BATCHES, WAYS, step

import mtlfast
from mtlfast.aggregation import PCGrad, Sum

NUM_TASKS = 3


def heads_for(width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, 1) for _ in range(NUM_TASKS)).double()


def check(way: str, trunk: nn.Module, heads: nn.ModuleList, x: Tensor, tolerance: float = 1e-10) -> None:
    """A step of the way is the one by hand: `torch.autograd.grad` for each task, and an aggregator on the rows."""
    trunk, heads = copy.deepcopy(trunk), copy.deepcopy(heads)
    by_hand, of_heads = copy.deepcopy(trunk), copy.deepcopy(heads)
    aggregator = Sum() if way == "at" else PCGrad(order="fixed")  # `at` approximates, except for fixed weights
    step(way, trunk, heads, x, aggregator)

    features = by_hand(x)
    losses = [(head(features) - k).square().mean() for k, head in enumerate(of_heads)]
    shared = [p for p in by_hand.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    plain = torch.autograd.grad(sum(losses), list(of_heads.parameters()))
    expected = [*aggregator(mtlfast.TaskGradients.from_rows(rows)), *plain]
    got = [p for p in trunk.parameters() if p.requires_grad] + list(heads.parameters())
    for p, gradient in zip(got, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=tolerance, atol=tolerance)
    assert all(p.grad is None for p in trunk.parameters() if not p.requires_grad)


class Checkpointed(nn.Module):
    """A trunk whose middle part recomputes its activations in the backward pass; None: keeps them."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6).double(), nn.Linear(6, 5).double()
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 6)).double()
        self.reentrant, self.runs = reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.last(self.part(x))
        return self.last(checkpoint(self.part, x, use_reentrant=self.reentrant))

    def part(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.middle(x)


def checkpointed(way: str, reentrant: bool | None) -> tuple[int, list[Tensor]]:
    """How often the part ran, and all gradients."""
    trunk, heads = Checkpointed(reentrant), heads_for(5)
    torch.manual_seed(2)
    heads.load_state_dict({name: torch.randn_like(p) for name, p in heads.state_dict().items()})
    step(way, trunk, heads, torch.randn(8, 4).double(), PCGrad(order="fixed"))
    return trunk.runs, [p.grad for p in (*trunk.parameters(), *heads.parameters())]


@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpoints_change_no_gradient(way):
    """Each backward pass recomputes: K times from one forward pass, once with `at`."""
    (runs, kept), (again, recomputed) = checkpointed(way, None), checkpointed(way, False)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    passes = {"accumulator": NUM_TASKS * MICRO_BATCHES, "at": 1}.get(way, NUM_TASKS)
    assert again == runs + passes


def test_reentrant_checkpoints_work_below_features_alone():
    (_, kept), (_, recomputed) = checkpointed("at", None), checkpointed("at", True)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    for way in WAYS:
        if way != "at":
            with pytest.raises(ValueError, match="expected use_reentrant=False"):
                checkpointed(way, True)


class Recurrent(nn.Module):
    """The last output of a recurrent layer, over sequences of different lengths if `packed`; zeros are padding."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool, bidirectional: bool) -> None:
        super().__init__()
        self.layer = kind(3, 4, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.packed = packed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            lengths = (x != 0).any(2).sum(1)
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, last = self.layer(x)
        return (last[0] if isinstance(last, tuple) else last).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "both"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind, bidirectional, packed, way):
    x = torch.randn(6, 5, 3).double()
    for i, length in enumerate((5, 2, 4, 1, 3, 5)):
        x[i, length:] = 0
    trunk = Recurrent(kind, packed, bidirectional)
    check(way, trunk, heads_for(16 if bidirectional else 8), x)


@pytest.mark.parametrize("way", WAYS)
def test_batch_norm_statistics_move_once_a_forward_pass(way):
    torch.manual_seed(0)
    trunk, heads = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)).double(), heads_for(5)
    other, x = copy.deepcopy(trunk), torch.randn(8, 4).double()
    forwards = {"closures": [x] * NUM_TASKS, "accumulator": x.chunk(MICRO_BATCHES)}.get(way, [x])
    step(way, trunk, heads, x, PCGrad(order="fixed"))
    for part in forwards:
        other(part)
    assert trunk[1].num_batches_tracked == len(forwards)
    assert all(torch.equal(a, b) for a, b in zip(trunk.buffers(), other.buffers(), strict=True))


class Pooled(nn.Module):
    """The mean over the last hidden states of a language model."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, ids: Tensor) -> Tensor:
        return self.language_model(input_ids=ids, use_cache=False).last_hidden_state.mean(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("recompute", "way"),
    # Recomputing needs embeddings that require grad, which are then leaves behind the features as parameters are.
    [(recompute, way) for recompute in (False, True) for way in WAYS if not (recompute and way == "features")],
)
def test_adapters_of_a_frozen_model_are_shared(recompute, way):
    """Surgery on LoRA's matrices alone: nothing else has a gradient."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes))
    if recompute:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trunk = Pooled(peft.get_peft_model(base, config)).double().train()
    assert sum(p.requires_grad for p in trunk.parameters()) == 2 * 2 * 2  # A and B, of two matrices, in two layers
    check(way, trunk, heads_for(8), torch.randint(0, 20, (4, 6)), tolerance=1e-6)  # the model's softmax is float32


class Complex(nn.Module):
    """The absolute values of a complex product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).abs()


@pytest.mark.parametrize("way", WAYS)
def test_complex_parameters_of_heads_have_their_plain_gradients(way):
    torch.manual_seed(0)
    trunk = nn.Linear(4, 5).double()
    heads = nn.ModuleList(nn.Sequential(Complex(5), nn.Linear(5, 1).double()) for _ in range(NUM_TASKS))
    check(way, trunk, heads, torch.randn(8, 4).double())


@pytest.mark.parametrize("way", WAYS)
def test_complex_parameters_may_lie_below_features_and_are_not_shared(way):
    torch.manual_seed(0)
    trunk, heads, x = nn.Sequential(nn.Linear(4, 5).double(), Complex(5)), heads_for(5), torch.randn(8, 4).double()
    if way != "at":
        with pytest.raises(TypeError, match=r"has dtype torch\.complex128, expected float32, float64"):
            step(way, trunk, heads, x, PCGrad())
        assert all(p.grad is None for p in (*trunk.parameters(), *heads.parameters()))
        return
    other, plain = copy.deepcopy(trunk), copy.deepcopy(heads)
    step(way, trunk, heads, x, Sum())
    features = other(x)
    sum((head(features) - k).square().mean() for k, head in enumerate(plain)).backward()
    for a, b in zip(
        (*trunk.parameters(), *heads.parameters()), (*other.parameters(), *plain.parameters()), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad)
