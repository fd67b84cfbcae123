"""What the implicit way costs: floating-point operations, memory, and how long the graph lives."""

import pytest
import torch
from implicit_steps import WEIGHTS, Tasks, mlp
from implicit_trunks import TRUNKS
from peaks import peak_bytes
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import mtlfast
from mtlfast.aggregation import Constant

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("every_size")]


GAINS_LITTLE = ("LoRA", "a weight in two forms", "LSTM", "GRU")


def flops_of(model, x, way):
    losses = model.losses(x)
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        result = mtlfast.backward(
            losses, Constant(WEIGHTS[: len(losses)]), shared=model.trunk, jacobian=way, diagnostics=True
        )
    return counter.get_total_flops(), result.plan


@pytest.mark.whole
@pytest.mark.parametrize("num_tasks", [2, 5])
@pytest.mark.parametrize("name", TRUNKS)
def test_auto_takes_no_more_flops_than_the_stored_way(name, num_tasks):
    gained = False
    for shape in ((1, 4), (3, 8)):
        model, x = Tasks(TRUNKS[name](), 32, num_tasks), torch.randn(*shape, 32)
        stored, _ = flops_of(model, x, "stored")
        for _ in range(2):  # the second step knows more
            auto, plan = flops_of(model, x, "auto")
            assert auto <= stored, plan
            gained |= auto < stored
    # A checkpoint is computed once more for the layers' inputs, as much as one task's weight gradients.
    assert gained or name in GAINS_LITTLE or (num_tasks == 2 and name.startswith("checkpointed"))


@pytest.mark.parametrize("sweep", ["batched", "sequential"])
def test_the_passes_multiply_out_no_weight_gradient_of_an_implicit_layer(sweep):
    """All that the step multiplies is what the plan predicts, beside the input gradients and the heads."""
    width, rows, depth, tasks = 32, 4, 3, 4
    model, x = Tasks(mlp(width, depth), width, tasks), torch.randn(rows, width)
    if sweep == "sequential":
        model.trunk[1].register_full_backward_hook(lambda *_: None)
    counted, plan = flops_of(model, x, "implicit")
    assert plan.sweep == sweep
    weights = [layer for layer in plan.layers if layer.way == "implicit"]
    assert len(weights) == depth
    inputs = tasks * (depth - 1) * 2 * rows * width * width
    heads = tasks * 2 * 2 * rows * width
    assert counted == sum(layer.flops for layer in weights) + inputs + heads


def test_layers_with_one_input_share_its_products():
    width, rows, tasks = 32, 4, 4
    model, x = Tasks(TRUNKS["one input for several"](), width, tasks), torch.randn(rows, width)
    counted, plan = flops_of(model, x, "implicit")
    layers = [layer.flops for layer in plan.layers if layer.way == "implicit"]
    assert len(layers) == 3
    heads = tasks * 2 * 2 * rows * width
    assert counted == sum(layers) - 2 * (2 * rows * rows * width) + heads


def test_memory_with_few_rows():
    width, tasks = 128, 8
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
    model, x = Tasks(nn.TransformerEncoder(layer, 2), width, tasks), torch.randn(1, 32, width)
    stored = tasks * sum(p.numel() for p in model.trunk.parameters()) * 4

    def peak(run):
        model.zero_grad()
        losses = model.losses(x)
        return peak_bytes(lambda: run(losses))

    plain = peak(lambda losses: sum(losses).backward())
    for way, most in (("implicit", 0.25), ("implicit", 0.25), ("stored", 2.0)):  # the first step keeps the graph
        extra = peak(
            lambda losses, way=way: mtlfast.backward(losses, Constant(WEIGHTS), shared=model.trunk, jacobian=way)
        )
        assert extra - plain <= most * stored
    assert extra - plain > 0.5 * stored  # of the stored way


def alive(model, x, way, retain_graph=False):
    """How many of the trunk's activations are in memory after a step, while the losses are held."""
    seen = []

    def note(module, args, output):
        seen.append(StorageWeakRef(output.untyped_storage()))

    handles = [model.trunk[i].register_forward_hook(note) for i in (1, 3)]
    losses = model.losses(x)
    for handle in handles:
        handle.remove()
    result = mtlfast.backward(
        losses, Constant(WEIGHTS[: len(losses)]), shared=model.trunk, jacobian=way, retain_graph=retain_graph
    )
    return sum(not reference.expired() for reference in seen), result.plan.sweep


@pytest.mark.parametrize("sweep", ["batched", "sequential"])
def test_the_graph_is_freed_after_a_step(sweep):
    model, x = Tasks(mlp(16, 3), 16, 3), torch.randn(2, 16)
    if sweep == "sequential":
        model.trunk[2].register_full_backward_hook(lambda *_: None)
    first, _ = alive(model, x, "implicit")
    assert first == (2 if sweep == "batched" else 0)  # a batched pass may fail the first time
    assert alive(model, x, "implicit") == (0, sweep)
    assert alive(model, x, "implicit", retain_graph=True) == (2, sweep)
    assert alive(model, x, "stored")[0] == 0
