"""An accumulator's state: saved, loaded, copied, after a failure, and with parameters that are frozen and unfrozen."""

import copy

import pytest
import torch
from resumed import Net, Training
from torch import nn

import mtlfast
from mtlfast.aggregation import UPGrad


def part_way(begun: int = 1, seed: int = 0, **settings) -> Training:
    """A run in the middle of an accumulation."""
    run = Training("accumulated", UPGrad, seed=seed, **settings)
    run.add(begun)
    return run


def assert_same_step(run: Training, other: Training) -> None:
    torch.manual_seed(9)
    ours = run.step()
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(ours, other.step(), strict=True))


def test_a_state_replaces_what_an_accumulator_has():
    run, other = part_way(1), part_way(2, seed=1)
    other.load(run.save())
    assert len(other.accumulator) == 1
    assert_same_step(run, other)


def test_the_state_of_an_empty_accumulator_empties():
    run = part_way()
    run.accumulator.load_state_dict(Training("accumulated", UPGrad).accumulator.state_dict(run.net), run.net)
    assert len(run.accumulator) == 0
    run.accumulator.add([run.net.last.weight.sum(), run.net.last.bias.sum()])  # another number of tasks may come
    other = part_way()
    other.accumulator.reset()
    other.accumulator.add([other.net.last.weight.sum(), other.net.last.bias.sum()])
    for each in (run, other):
        mtlfast.backward(each.accumulator, UPGrad())
    assert torch.equal(run.net.last.weight.grad, other.net.last.weight.grad)


def test_a_state_is_of_its_own():
    run = part_way(2)  # what is a sum already is added to in place
    state = run.accumulator.state_dict(run.net)
    before = copy.deepcopy(state)
    run.add(1)
    other = part_way()
    other.accumulator.load_state_dict(state, other.net)
    other.add(1)
    other.step()
    for name, of_tasks in before["gradients"].items():
        assert all(torch.equal(state["gradients"][name][task], gradient) for task, gradient in of_tasks.items())
    assert state["losses"] == before["losses"]


def test_names_are_kept():
    run, other = part_way(), part_way(seed=1)
    other.load(run.save())
    assert mtlfast.backward(other.accumulator, UPGrad()).names == ("task 0", "task 1", "task 2")


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16, torch.float64, None])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float64, None])
def test_a_state_may_have_another_storage_dtype(saved, loaded):
    run, other = part_way(2, storage_dtype=saved), part_way(0, seed=1, storage_dtype=loaded)
    other.load(run.save())
    kept = {g.dtype for g in other.accumulator.state_dict(other.net)["gradients"]["last.weight"].values()}
    assert kept == {loaded or torch.float32}
    ours, theirs = run.step(), other.step()
    assert torch.allclose(ours[1], theirs[1], rtol=0.1)
    assert other.net.last.weight.grad.dtype == torch.float32


def without(run: Training, name: str) -> Net:
    net = run.net
    setattr(net, name, nn.Identity())
    return net


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda run: Net(3), "none of the 7 shared parameters is in the model, expected all"),
        (
            lambda run: nn.ModuleList([run.net]),
            r"heads.0.weight of the model is not there, expected shape \[1, 8\] as in the state",
        ),
        (
            lambda run: without(run, "last"),
            r"last.weight of the model is not there, expected shape \[8, 8\] as",
        ),
    ],
)
def test_a_state_that_does_not_fit_the_model(model, sentence):
    run, other = part_way(), part_way(2, seed=1)
    state = run.accumulator.state_dict(run.net)
    with pytest.raises(ValueError, match=sentence):
        other.accumulator.load_state_dict(state, model(other))
    assert len(other.accumulator) == 2


def test_another_shape_in_the_model():
    run, other = part_way(), Training("accumulated", UPGrad, num_tasks=2)
    other.net.last.weight = nn.Parameter(torch.ones(3, 3))
    other.accumulator = mtlfast.TaskGradientAccumulator(other.net.shared)
    with pytest.raises(ValueError, match=r"last.weight of the model has shape \[3, 3\], expected shape \[8, 8\] as"):
        other.accumulator.load_state_dict(run.accumulator.state_dict(run.net), other.net)


def test_a_model_without_a_parameter_that_has_a_gradient():
    run = part_way()
    with pytest.raises(
        ValueError, match=r"the losses reach a parameter of shape \[1, 8\], expected one of the model's"
    ):
        run.accumulator.state_dict(nn.ModuleList(run.net.shared))


@pytest.mark.parametrize("key", ["gradients", "micro_batches", "number", "names", "counts", "losses"])
def test_what_is_no_state(key):
    run = part_way()
    state = run.accumulator.state_dict(run.net)
    del state[key]
    for wrong in (state, None, [1]):
        with pytest.raises(ValueError, match=r"the state has no \w+, expected what state_dict\(\) returned"):
            run.accumulator.load_state_dict(wrong, run.net)
    assert_same_step(run, part_way())


def failing(run: Training, task: int) -> dict:
    """Closures of which one fails, after those before it have run."""

    def fails():
        raise RuntimeError("planted")

    w = run.net.last.weight
    return {f"task {k}": fails if k == task else lambda k=k: (w * (k + 1)).sum() for k in range(3)}


def test_a_call_that_fails_in_the_middle_is_not_saved():
    run, other = part_way(), part_way()
    file = run.save()
    with pytest.raises(RuntimeError, match="planted"):
        run.accumulator.add(failing(run, 1))
    for call in (lambda: run.accumulator.state_dict(run.net), lambda: run.add(1), run.accumulator.jacobian):
        with pytest.raises(RuntimeError, match=r"an earlier call of TaskGradientAccumulator.add failed in the middle"):
            call()
    run.load(file)  # this, or `reset`
    assert_same_step(run, other)


def test_a_call_that_fails_before_anything_is_added_counts_for_nothing():
    run, other = part_way(), part_way()
    with pytest.raises(RuntimeError, match="planted"):
        run.accumulator.add(failing(run, 0))
    assert len(run.accumulator) == 1
    assert_same_step(run, other)


def test_reset_forgets_a_failed_call():
    run, other = part_way(), Training("accumulated", UPGrad)
    other.batch()
    with pytest.raises(RuntimeError, match="planted"):
        run.accumulator.add(failing(run, 2))
    run.accumulator.reset()
    assert len(run.accumulator) == 0
    other.net.load_state_dict(run.net.state_dict())  # BatchNorm has seen a batch
    assert_same_step(run, other)


@pytest.mark.parametrize("shared", ["given", None])
@pytest.mark.parametrize("first", ["the model", "the accumulator"])
def test_a_deep_copy_with_the_model_goes_on_as_the_original(first, shared):
    run = part_way(2, **({} if shared else {"shared": None}))
    if first == "the model":
        net, accumulator = copy.deepcopy((run.net, run.accumulator))
    else:
        accumulator, net = copy.deepcopy((run.accumulator, run.net))
    assert len(accumulator) == 2
    for own, made in ((run.net, run.accumulator), (net, accumulator)):
        torch.manual_seed(3)
        ids = torch.arange(4)
        features = own.first(own.table(ids))
        made.add([own.loss(k, features, ids) for k in range(3)])
        mtlfast.backward(made, UPGrad())
    for p, q in zip(run.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_deep_copy_alone_leaves_the_original_as_it_is():
    run, other = part_way(2), part_way(2)
    copied = copy.deepcopy(run.accumulator)
    copied.reset()
    assert_same_step(run, other)


@pytest.mark.parametrize("shared", ["given", None])
def test_parameters_are_frozen_and_unfrozen_between_steps(shared):
    run = Training("accumulated", UPGrad, **({} if shared else {"shared": None}))
    for frozen in ([run.net.first], [], [run.net.table, run.net.last], []):
        run.net.requires_grad_(True)
        for module in frozen:
            module.requires_grad_(False)
        other = copy.deepcopy(run.net)
        torch.manual_seed(2)
        ids = torch.arange(4)
        for net in (run.net, other):
            torch.manual_seed(2)
            net.zero_grad()
            features = net.first(net.table(ids))
            losses = [net.loss(k, features, ids) for k in range(3)]
            if net is other:
                mtlfast.backward(losses, UPGrad(), shared=net.shared if shared else None)
            else:
                run.accumulator.add(losses)
                mtlfast.backward(run.accumulator, UPGrad())
        for p, q in zip(run.net.parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("shared", ["given", None])
def test_parameters_that_were_frozen_in_the_middle_get_nothing(shared):
    run = part_way(2, **({} if shared else {"shared": None}))
    run.net.last.requires_grad_(False)
    run.net.heads[0].requires_grad_(False)
    mtlfast.backward(run.accumulator, UPGrad())
    assert all(p.grad is None for p in [*run.net.last.parameters(), *run.net.heads[0].parameters()])
    assert run.net.table.weight.grad is not None
