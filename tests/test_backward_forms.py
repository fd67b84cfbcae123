"""`mtlfast.backward` takes every form of its arguments with a plain meaning. All others raise one sentence."""

import copy

import pytest
import torch
from test_backward_like_plain import Net, assert_like_plain

import mtlfast
from mtlfast.aggregation import MGDA, PCGrad, Sum


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 4)


FORMS = {
    "a generator of parameters": lambda net: net.trunk.parameters(),
    "a module": lambda net: net.trunk,
    "several modules": lambda net: list(net.trunk),
    "modules and parameters": lambda net: [net.trunk[0], *net.trunk[2].parameters()],
    "named parameters": lambda net: net.trunk.named_parameters(),
    "a dict": lambda net: dict(net.trunk.named_parameters()),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_shared(form, x):
    net = Net()
    plain = copy.deepcopy(net)
    sum(plain.losses(x)).backward()
    mtlfast.backward(net.losses(x), Sum(), shared=FORMS[form](net))
    assert_like_plain(net, plain)


@pytest.mark.parametrize("form", [tuple, iter, lambda losses: dict(zip("ab", losses, strict=True)), torch.stack])
def test_forms_of_losses(form, x):
    net = Net()
    plain = copy.deepcopy(net)
    sum(plain.losses(x)).backward()
    result = mtlfast.backward(form(net.losses(x)), Sum(), shared=net.trunk)
    assert_like_plain(net, plain)
    assert result.tasks == (0, 1)


def test_errors_use_the_names_of_tasks_and_parameters(x):
    net = Net()
    a, b = net.losses(x)
    with pytest.raises(ValueError, match="backward: loss depth has shape"):
        mtlfast.backward({"segmentation": a, "depth": b.repeat(2)}, Sum(), shared=net.trunk)
    result = mtlfast.backward({"segmentation": None, "depth": b}, Sum(), shared=net.trunk)
    assert result.tasks == (1,)
    with pytest.raises(ValueError, match=r"backward: 0\.weight is the same parameter as trunk\.0\.weight"):
        mtlfast.backward([a], Sum(), shared=[*net.named_parameters(), *net.trunk.named_parameters()])


REFUSED = [
    (
        {"aggregator": PCGrad},
        TypeError,
        r"aggregator is the class PCGrad, expected an instance, as PCGrad\(\)",
    ),
    ({"aggregator": "PCGrad"}, TypeError, "backward: aggregator is a str, expected a mtlfast.aggregation.Aggregator"),
    ({"weighting": mtlfast.weighting.UW}, TypeError, "backward: weighting is the class UW, expected an instance"),
    ({"shared": 3}, TypeError, "backward: shared is a int, expected a list of parameters or a module"),
    (
        {
            "shared": {
                "a": torch.nn.Parameter(torch.ones(2)),
                "b": torch.nn.Parameter(torch.ones(2, dtype=torch.cfloat)),
            }
        },
        TypeError,
        "backward: b has dtype torch.complex64, expected float32, float64, bfloat16 or float16",
    ),
    (
        {"shared": {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(2, device="meta"))}},
        ValueError,
        "backward: b is on meta, expected cpu as a",
    ),
    ({"losses": 3}, TypeError, "backward: losses is a int, expected a list of scalars"),
    ({"losses": None}, TypeError, "backward: losses is a NoneType, expected a list of scalars"),
    ({"loss_scale": "x"}, ValueError, "Sum: loss_scale is 'x', expected a number above 0"),
    ({"loss_scale": 0.0}, ValueError, "Sum: loss_scale is 0.0, expected a number above 0"),
    ({"loss_scale": -1}, ValueError, "Sum: loss_scale is -1, expected a number above 0"),
    ({"loss_scale": True}, ValueError, "Sum: loss_scale is True, expected a number above 0"),
    ({"loss_scale": torch.tensor(0.0)}, ValueError, r"Sum: loss_scale is tensor\(0\.\), expected a number above 0"),
    ({"loss_scale": float("nan")}, ValueError, "Sum: loss_scale is nan, expected a number above 0"),
    ({"loss_scale": [2.0]}, ValueError, r"Sum: loss_scale is \[2\.0\], expected a number above 0"),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED, ids=[message[:50] for *_, message in REFUSED])
def test_one_sentence_for_what_is_none(given, error, message, x):
    net = Net()
    arguments = {"losses": net.losses(x), "aggregator": Sum(), "shared": net.trunk, **given}
    with pytest.raises(error, match=message):
        mtlfast.backward(arguments.pop("losses"), arguments.pop("aggregator"), **arguments)
    assert all(p.grad is None for p in net.parameters())


def test_a_call_by_hand_says_what_it_takes():
    with pytest.raises(TypeError, match=r"MGDA: got a list, expected TaskGradients \(TaskGradients.from_rows"):
        MGDA()([torch.ones(3), torch.ones(3)])


@pytest.mark.parametrize("tasks", [[0, 0, 1], [0, -1, 2], [0, 1]])
@pytest.mark.parametrize("make", [Sum, MGDA, lambda: mtlfast.aggregation.Constant(torch.ones(3))])
def test_tasks_are_different_indices(make, tasks):
    message = "twice" if tasks == [0, 0, 1] else "expected an index" if -1 in tasks else "expected equal numbers"
    with pytest.raises(ValueError, match=message):
        make().weights(torch.eye(3, dtype=torch.float64), tasks=tasks)


def test_reentrant_checkpoints_are_named(x):
    from torch.utils.checkpoint import checkpoint

    net = Net()
    x.requires_grad_()
    for part in (net.trunk, net.trunk[0]):  # all of the trunk hidden, or a part of it
        features = checkpoint(part, x, use_reentrant=True)
        features = features if part is net.trunk else net.trunk[2](features)
        with pytest.raises(ValueError, match=r"the losses go through torch\.utils\.checkpoint with use_reentrant"):
            mtlfast.backward([head(features).mean() for head in net.heads], Sum(), shared=net.trunk)
    features = checkpoint(net.trunk, x, use_reentrant=False)
    mtlfast.backward([head(features).mean() for head in net.heads], Sum(), shared=net.trunk)
    assert all(p.grad is not None for p in net.trunk.parameters())
