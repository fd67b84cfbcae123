"""A run that is saved in the middle of an epoch and resumed by new objects is bitwise the uninterrupted run."""

from collections.abc import Callable

import pytest
import torch
from elementwise import stacked
from methods import METHODS, numbers_of_tasks, products
from resumed import MICRO_BATCHES, Training
from stateful import METHODS as STATEFUL
from test_copies import DRAWING
from weightings import WEIGHTINGS

from mtlfast.aggregation import Aggregator, PCGrad, UPGrad
from mtlfast.aggregation._random_order import HasGenerator
from mtlfast.weighting import UW

STEPS = 20


class Smoothed(Aggregator):
    """An element-wise method of a user, whose state has the shape of all gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", None)

    def aggregate(self, grads, step, out):
        totals = [None if x is None else stacked(grads, t).sum(0) for t, x in enumerate(out)]
        flat = torch.cat([x.flatten() for x in totals])
        self.state = flat if self.state is None else 0.5 * (self.state + flat)
        parts = self.state.split([x.numel() for x in totals])
        return [part.view_as(x) for part, x in zip(parts, totals, strict=True)]


def remembers(made: Aggregator) -> bool:
    """Whether the method has a state or draws random numbers."""
    return bool(made.keeps) or any(isinstance(module, HasGenerator) for module in made.modules())


METHODS_WITH_STATE: dict[str, Callable[[], Aggregator]] = {
    **{name: method.make for name, method in METHODS.items() if remembers(method.make()) and not method.cross},
    **{
        f"{name} with a generator": lambda make=make: make(generator=torch.Generator().manual_seed(3))
        for name, make in DRAWING.items()
    },
    "Smoothed": Smoothed,
    **{name: method.make for name, method in STATEFUL.items()},
}
WEIGHTINGS_WITH_STATE = {
    name: make for name, make in WEIGHTINGS.items() if make().keeps or name == "Random" or make().state_dict()
}
WAYS = ["stored", "closures", "accumulated"]


def tasks_of(name: str) -> int:
    return max(numbers_of_tasks(METHODS[name], 3) or [4]) if name in METHODS else 3


def assert_resumed_is_uninterrupted(make: Callable[..., Training], begun: int = 0) -> None:
    """Saves a run after five steps and `begun` micro-batches; another run that loads it makes the same next steps."""
    run = make(seed=0)
    for _ in range(5):
        run.step()
    if run.way == "accumulated":
        run.add(begun)
    file = run.save()
    wanted = [run.step() for _ in range(STEPS)]
    again = make(seed=1)
    again.load(file)
    assert len(again.accumulator) == begun or run.way != "accumulated"
    for ours in wanted:
        theirs = again.step()
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert_equal_states({name: part.state_dict() for name, part in run.parts.items()}, again)


def assert_equal_states(states, again: Training) -> None:
    for name, part in again.parts.items():
        ours, theirs = flat(states[name]), flat(part.state_dict())
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
            assert same or (isinstance(value, torch.Tensor) and torch.equal(value.isnan(), theirs[key].isnan())), key


def flat(state, prefix=""):
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    if isinstance(state, list):
        return flat(dict(enumerate(state)), prefix)
    return {prefix: state}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS_WITH_STATE)
def test_a_method(name, way):
    make = METHODS_WITH_STATE[name]
    assert_resumed_is_uninterrupted(lambda seed: Training(way, make, num_tasks=tasks_of(name), seed=seed), begun=1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WEIGHTINGS_WITH_STATE)
def test_a_weighting(name, way):
    make = WEIGHTINGS_WITH_STATE[name]
    assert_resumed_is_uninterrupted(lambda seed: Training(way, PCGrad, make, seed=seed), begun=2)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].cross])
def test_a_method_of_two_batches(name):
    method = METHODS[name]
    matrices = [products(method, torch.randn(3, 9, dtype=torch.float64)) for _ in range(5 + STEPS)]
    run, again = method.make(), method.make()
    for matrix in matrices[:5]:
        run.weights(matrix)
    again.load_state_dict(run.state_dict())
    for matrix in matrices[5:]:
        assert torch.equal(run.weights(matrix), again.weights(matrix))


@pytest.mark.parametrize("begun", range(MICRO_BATCHES))
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("storage_dtype", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shared", ["given", None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_accumulator(begun, sparse, storage_dtype, shared, reduction):
    settings = {"sparse": sparse, "storage_dtype": storage_dtype, "reduction": reduction}
    if shared is None:
        settings["shared"] = None
    assert_resumed_is_uninterrupted(
        lambda seed: Training("accumulated", UPGrad, lambda: UW(3), seed=seed, **settings), begun
    )
