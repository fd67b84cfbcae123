"""What a `TaskGradientAccumulator` refuses, and what happens between its micro-batches."""

import copy

import pytest
import torch
from peaks import peak_bytes
from torch.utils.checkpoint import checkpoint
from ways_of_net import Net

import mtlfast
from mtlfast import TaskGradientAccumulator
from mtlfast.aggregation import Constant, PCGrad, Sum, UPGrad

NET = Net(2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_in_closures_and_accumulators(mode):
    net, twin = Net(), Net()
    accumulator, losses = TaskGradientAccumulator(net.shared), [net.losses(), net.losses()]
    with mode():
        accumulator.add(losses[0])
        accumulator.add(losses[1])
    accumulator.add(net.closures())
    with mode():
        accumulator.add(net.closures())
        mtlfast.backward(accumulator, UPGrad())
        mtlfast.backward(net.closures(), UPGrad(), shared=net.shared)
    for _ in range(2):
        mtlfast.backward(twin.losses(), UPGrad(), shared=twin.shared)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12)


def test_a_name_stands_for_one_task_in_all_micro_batches():
    net = Net(2)
    accumulator = TaskGradientAccumulator(net.trunk)
    a, b = net.losses()
    accumulator.add({"a": a, "b": b})
    expected = "entry 0 is b, expected the entries in one order in all calls of a step: 0 is a, 1 is b"
    for wrong in ({"b": net.loss(1), "a": net.loss(0)}, {"b": net.loss(1), "c": None}):
        with pytest.raises(ValueError, match=expected):
            accumulator.add(wrong)
    accumulator.add({"a": None, "b": net.loss(1)})
    assert len(accumulator) == 2
    result = mtlfast.backward(accumulator, UPGrad())
    assert result.names == ("a", "b")
    accumulator.add({"b": net.loss(1), "a": net.loss(0)})  # another step


def test_a_call_of_add_that_is_refused_leaves_the_sums_as_they_were():
    net = Net(2)
    accumulator = TaskGradientAccumulator(net.trunk)
    accumulator.add(net.losses())
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    hidden = checkpoint(net.trunk, x, use_reentrant=True)
    with pytest.raises(ValueError, match=r"TaskGradientAccumulator\.add: the losses go through .*use_reentrant"):
        accumulator.add(net.losses(hidden))
    with pytest.raises(ZeroDivisionError):
        accumulator.add([lambda: 1 / 0, net.closures()[1]])
    accumulator.add(net.losses())
    assert len(accumulator) == 2
    with pytest.raises(ZeroDivisionError):
        accumulator.add([net.closures()[0], lambda: 1 / 0])
    for call in (lambda: accumulator.add(net.losses()), lambda: mtlfast.backward(accumulator, Sum())):
        with pytest.raises(RuntimeError, match=r"failed in the middle.*expected reset\(\) first"):
            call()
    accumulator.reset()
    accumulator.add(net.losses())
    mtlfast.backward(accumulator, Sum())


def test_parameters_that_are_unfrozen_later_are_shared():
    net = Net(2)
    net.trunk[0].weight.requires_grad_(False)
    accumulator = TaskGradientAccumulator(net.trunk.parameters())
    for unfrozen in (False, True):
        net.trunk[0].weight.requires_grad_(unfrozen)
        accumulator.add(net.losses())
        mtlfast.backward(accumulator, Constant(torch.zeros(2)))
    assert not net.trunk[0].weight.grad.any()
    assert net.heads[0].weight.grad.any()


@pytest.mark.parametrize("shared", [True, False])
def test_parameters_that_are_frozen_meanwhile_are_left_alone(shared):
    net = Net(2)
    accumulator = TaskGradientAccumulator(net.trunk if shared else None)
    accumulator.add(net.losses())
    frozen = [net.trunk[0].weight, net.heads[0].weight]
    for p in frozen:
        p.requires_grad_(False)
    accumulator.add(net.losses())
    mtlfast.backward(accumulator, UPGrad())
    assert [p.grad for p in frozen] == [None, None]
    assert net.trunk[0].bias.grad is not None


def test_a_copy_of_an_accumulator_knows_the_copied_parameters():
    net = Net(2)
    accumulator = TaskGradientAccumulator(net.trunk)
    accumulator.add(net.losses())
    twin, other = copy.deepcopy((net, accumulator))
    for one, its in ((net, accumulator), (twin, other)):
        its.add(one.losses())
        mtlfast.backward(its, UPGrad())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(("saved", "kept"), [(torch.float32, None), (None, torch.float32)])
def test_a_checkpoint_of_another_storage_dtype(saved, kept):
    net, twin = Net(2), Net(2)
    first, third = TaskGradientAccumulator(net.trunk, storage_dtype=saved), TaskGradientAccumulator(twin.trunk)
    first.add([net.loss(0), None])
    third.add([twin.loss(0), None])
    second = TaskGradientAccumulator(net.trunk, storage_dtype=kept)
    second.load_state_dict(first.state_dict(net), net)
    loaded = second.jacobian()
    loaded.obtain()
    assert loaded.rows().dtype == (kept or torch.float64)
    second.load_state_dict(first.state_dict(net), net)
    for model, accumulator in ((net, second), (twin, third)):
        accumulator.add([None, model.loss(1)])
        mtlfast.backward(accumulator, PCGrad(order="fixed"))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: TaskGradientAccumulator(torch.ones(2)),
            TypeError,
            "TaskGradientAccumulator: shared is a Tensor, expected a list of parameters",
        ),
        (
            lambda: TaskGradientAccumulator(3),
            TypeError,
            "TaskGradientAccumulator: shared is a int, expected a list of parameters or a module",
        ),
        (
            lambda: TaskGradientAccumulator(storage_dtype=torch.int8),
            TypeError,
            "TaskGradientAccumulator: storage_dtype is torch.int8, expected float32, float64, bfloat16 or float16",
        ),
        (
            lambda: TaskGradientAccumulator(reduction="max"),
            ValueError,
            'TaskGradientAccumulator: reduction is \'max\', expected "mean" or "sum"',
        ),
        (
            lambda: TaskGradientAccumulator().load_state_dict({}, NET),
            ValueError,
            "TaskGradientAccumulator.load_state_dict: the state has no gradients, expected what state_dict() returned",
        ),
        (
            lambda: mtlfast.backward(TaskGradientAccumulator(), Sum()),
            ValueError,
            "backward: the accumulator is empty, expected at least one call of add() before",
        ),
        (
            lambda: mtlfast.backward(TaskGradientAccumulator(), Sum(), retain_graph=True),
            ValueError,
            "backward: got retain_graph= beside an accumulator, expected one of them",
        ),
    ],
)
def test_arguments_that_do_not_fit_an_accumulator(call, error, sentence):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == sentence


@pytest.mark.native
def test_no_gradients_of_a_pass_are_held_beside_the_sums():
    trunk, x = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)]), torch.randn(4, 256)
    accumulator = mtlfast.TaskGradientAccumulator(trunk)
    closures = [lambda k=k: (trunk(x)[:, k] - k).square().mean() for k in range(3)]
    for _ in range(2):  # from the second call on there are sums to add to
        accumulator.add(closures)
    size = sum(p.numel() * p.element_size() for p in trunk.parameters())
    assert peak_bytes(lambda: accumulator.add(closures)) < 1.3 * size
