"""Sequences of training steps of all kinds agree with plain PyTorch, and a refused or failed step moves nothing.

The sequences are drawn by hypothesis, seeded by MTLFAST_SEED; MTLFAST_EXAMPLES multiplies their number (`make fuzz`).
"""

import copy
import io
import os
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from elementwise import Median
from hypothesis import HealthCheck, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sampling import SEED
from step_model import BATCH, NUM_TASKS, Model, Net, Sums, state_of, with_generator
from torch import Tensor

import mtlfast
from mtlfast import _grad
from mtlfast.aggregation import CRMOGM, MGDA, PCD, Aggregator, GradVac, Mean, NashMTL, PCGrad, UPGrad
from mtlfast.weighting import DWA, UW, Constant, FreezeConverged, LossWeighting

AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
    "PCGrad": with_generator(PCGrad),
    "GradVac": with_generator(GradVac),
    "CRMOGM": lambda: CRMOGM(with_generator(PCGrad)()),
    "NashMTL": NashMTL,
    "PCD": PCD,
    "MGDA": MGDA,
    "UPGrad": UPGrad,
    "Mean": Mean,
    "Median": Median,
}
# The shape of a state for n tasks.
SHAPES = {
    "GradVac": lambda n: (n + 1, n),
    "CRMOGM": lambda n: (n,),
    "NashMTL": lambda n: (n + 3,),
    "PCD": lambda n: (n + 1, 2),
}
WEIGHTINGS: dict[str, Callable[[], LossWeighting | None]] = {
    "none": lambda: None,
    "UW": lambda: UW(NUM_TASKS),
    "Constant": lambda: Constant(torch.tensor([0.5, 0.0, 2.0, 1.5])),
    "zeros": lambda: Constant(torch.zeros(NUM_TASKS)),
    "DWA": lambda: DWA(NUM_TASKS, window=2),
    "FreezeConverged": lambda: FreezeConverged(NUM_TASKS, patience=1, decay=0.0),
}
SHARED = {
    "both": lambda net: [net.first, net.second],
    "parameters": lambda net: [*net.second.parameters(), *net.first.parameters()],
    "second": lambda net: net.second.parameters(),
    "all three": lambda net: {f"{n}.{m}": p for n in NAMES["all three"] for m, p in getattr(net, n).named_parameters()},
    "found": lambda net: None,
}
NAMES = {
    "both": ["first", "second"],
    "parameters": ["first", "second"],
    "second": ["second"],
    "all three": ["first", "second", "common"],
    "found": None,
}
usual = st.sampled_from([1.0, 1.0, 1.0, 3.0, None])
unusual = st.sampled_from([1.0, 1.0, None, 0.0, torch.inf, torch.nan])


@st.composite
def factors(draw) -> list[float | None]:
    """For each task what its gradient is multiplied by, or None if it is absent; at least one task is present."""
    drawn = draw(st.lists(draw(st.sampled_from([usual, usual, unusual])), min_size=NUM_TASKS, max_size=NUM_TASKS))
    if draw(st.integers(0, 4)) == 0:
        drawn = [None] * NUM_TASKS
    if all(factor is None for factor in drawn):
        drawn[draw(st.integers(0, NUM_TASKS - 1))] = 1.0
    return drawn


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(7.0), b[k].nan_to_num(7.0)) for k in a)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-10, equal_nan=True)


class Steps(RuleBasedStateMachine):
    """A model that is trained, and beside it what plain PyTorch says about each step."""

    @initialize(aggregator=st.sampled_from(list(AGGREGATORS)), weighting=st.sampled_from(list(WEIGHTINGS)))
    def start(self, aggregator: str, weighting: str) -> None:
        self.name, self.makes = aggregator, (AGGREGATORS[aggregator], WEIGHTINGS[weighting])
        self.aggregator, self.weighting = (make() for make in self.makes)
        self.model = Model(*(make() for make in self.makes))
        self.number = 0  # of batches
        self.renew(Net())
        self.accumulate_into("both")

    def renew(self, net: Net) -> None:
        self.net, self.hooks = net, []
        for name, parameter in net.named_parameters():
            frozen = not parameter.requires_grad
            parameter.requires_grad_(True)  # a frozen one takes no hook
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.hooks.append(name))
            parameter.requires_grad_(not frozen)

    def accumulate_into(self, shared: str) -> None:
        """A new accumulator, which is empty."""
        self.accumulator = mtlfast.TaskGradientAccumulator(SHARED[shared](self.net))
        self.accumulated, self.shared = Sums(), shared

    def batch(self) -> Tensor:
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        return torch.randn(BATCH, 3, dtype=torch.float64, generator=generator)

    def losses(self, x: Tensor, drawn: list[float | None], closures: bool, named: bool) -> Any:
        made = [
            None if f is None else (lambda k=k, f=f: self.net.loss(k, x, f)) if closures else self.net.loss(k, x, f)
            for k, f in enumerate(drawn)
        ]
        return {f"task {k}": loss for k, loss in enumerate(made)} if named else made

    def everything(self) -> dict[str, Tensor]:
        """Copies of all that a step may change."""
        found = {f"grad {name}": p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
        found |= {f"aggregator {name}": x for name, x in state_of(self.aggregator).items()}
        found |= {f"weighting {name}": x for name, x in state_of(self.weighting).items()}
        if self.weighting is not None:
            named = self.weighting.named_parameters()
            found |= {f"weighting grad {name}": p.grad.clone() for name, p in named if p.grad is not None}
        return found

    # What trains.

    @rule(drawn=factors(), closures=st.booleans(), named=st.booleans(), shared=st.sampled_from(list(SHARED)))
    def step(self, drawn: list[float | None], closures: bool, named: bool, shared: str) -> None:
        x, sums = self.batch(), Sums()
        sums.add(self.net, x, drawn)
        losses = self.losses(x, drawn, closures, named)
        self.check_step(lambda: losses, sums, shared, {"shared": SHARED[shared](self.net)})

    @rule(drawn=factors(), closures=st.booleans(), named=st.booleans())
    def add(self, drawn: list[float | None], closures: bool, named: bool) -> None:
        before, x = self.everything(), self.batch()
        self.accumulated.add(self.net, x, drawn)
        self.accumulator.add(self.losses(x, drawn, closures, named))
        assert equal(self.everything(), before)

    @precondition(lambda self: self.accumulated.rows)
    @rule()
    def step_accumulated(self) -> None:
        if self.check_step(lambda: self.accumulator, self.accumulated, self.shared, {}):
            assert len(self.accumulator) == 0
            self.accumulated = Sums()

    def check_step(self, losses: Callable[[], Any], sums: Sums, shared: str, given: dict[str, Any]) -> bool:
        """Runs a step and compares it with the model; returns whether it was one."""
        before, added_to = self.everything(), len(self.accumulator)
        columns = self.model.columns(self.net, sums, NAMES[shared])

        def run() -> mtlfast.StepResult:
            return mtlfast.backward(losses(), self.aggregator, weighting=self.weighting, **given)

        if columns is None:
            with pytest.raises(ValueError, match="expected"):
                run()
            assert equal(self.everything(), before)
            assert len(self.accumulator) == added_to
            return False
        old = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
        kept, weighed = state_of(self.aggregator), state_of(self.weighting)
        result = run()
        added, values, weights = self.model.step(self.net, sums, columns)
        assert result.tasks == tuple(sorted(sums.rows))
        assert close(result.losses, values)
        if weights is not None:
            assert close(result.weights, weights)
        for name, parameter in self.net.named_parameters():
            wanted = old.get(name)
            if name in added:
                wanted = added[name] if wanted is None else wanted + added[name]
            assert (parameter.grad is None) == (wanted is None), name
            assert wanted is None or close(parameter.grad, wanted), name
        assert sorted(self.hooks) == sorted(added)
        self.hooks.clear()
        if not values.isfinite().all():
            assert any(not gradient.isfinite().all() for gradient in added.values())
        if any(not added[name].isfinite().all() for name in columns if name in added):
            now = state_of(self.aggregator)
            for name in [name for name in kept if not name.endswith("_extra_state")]:
                assert equal({name: now[name][tuple(map(slice, kept[name].shape))]}, {name: kept[name]}), name
        if not values.isfinite().all():
            if isinstance(self.weighting, FreezeConverged):  # its buffers have an entry for each task
                lost = [task for task, value in zip(result.tasks, values, strict=True) if not value.isfinite()]
                now = state_of(self.weighting)
                assert equal({name: x[lost] for name, x in now.items()}, {name: x[lost] for name, x in weighed.items()})
            self.clear(True)
        return True

    # What happens between steps.

    @rule(to_none=st.booleans())
    def clear(self, to_none: bool) -> None:
        for module in (self.net, self.weighting):
            if module is not None:
                module.zero_grad(set_to_none=to_none)

    @rule()
    def train(self) -> None:
        with torch.no_grad():
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad / (1 + parameter.grad.norm())

    @rule(frozen=st.sets(st.sampled_from(["first", "second", "common", "heads.0"]), max_size=3))
    def freeze(self, frozen: set[str]) -> None:
        """Freezes these and unfreezes all others."""
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name.rsplit(".", 1)[0] not in frozen)

    @rule(shared=st.sampled_from(list(SHARED)))
    def forget_accumulated(self, shared: str) -> None:
        self.net.requires_grad_(True)
        self.accumulate_into(shared)

    @rule(copied=st.booleans())
    def resume(self, copied: bool) -> None:
        """Goes on with new objects, which are deep copies or have loaded the states of the old ones."""
        if copied:
            everything = (self.accumulator, self.net, self.aggregator, self.weighting)
            self.accumulator, net, self.aggregator, self.weighting = copy.deepcopy(everything)
            for old, new in zip(self.net.parameters(), net.parameters(), strict=True):
                new.grad = old.grad
                new._post_accumulate_grad_hooks = None
            self.renew(net)
            return
        accumulated, old = self.accumulated, self.net
        parts = {"net": old, "aggregator": self.aggregator, "weighting": self.weighting}
        file = io.BytesIO()
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        torch.save(states | {"accumulator": self.accumulator.state_dict(old)}, file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        self.renew(Net())
        before = self.weighting
        self.aggregator, self.weighting = (make() for make in self.makes)
        parts = {"net": self.net, "aggregator": self.aggregator, "weighting": self.weighting}
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(states[name])
        self.accumulate_into(self.shared)
        self.accumulator.load_state_dict(states["accumulator"], self.net)
        self.accumulated = accumulated
        for p, q in [*zip(old.parameters(), self.net.parameters(), strict=True)]:
            q.grad, q.requires_grad = p.grad, p.requires_grad
        if self.weighting is not None:
            for p, q in zip(before.parameters(), self.weighting.parameters(), strict=True):
                q.grad = p.grad

    # What is refused or fails.

    @rule(which=st.integers(0, 7))
    def refused(self, which: int) -> None:
        before, added_to = self.everything(), len(self.accumulator)
        x = self.batch()
        losses, shared = [self.net.loss(k, x, 1.0) for k in range(NUM_TASKS)], self.net.heads[1]
        wrong: dict[str, Any] = [
            {"losses": [loss.detach() for loss in losses]},
            {"losses": [None] * NUM_TASKS},
            {"losses": [losses[0], lambda: losses[1]]},
            {"losses": self.accumulator, "shared": shared},
            {"shared": [losses[0]]},
            {"loss_scale": 0.0},
            {"storage_dtype": torch.int64},
            {"aggregator": type(self.aggregator)},
        ][which]
        call = {"losses": losses, "aggregator": self.aggregator, "shared": shared, "weighting": self.weighting} | wrong
        with pytest.raises((ValueError, TypeError), match="expected"):
            mtlfast.backward(**call)
        with pytest.raises((ValueError, TypeError), match="expected"):
            self.accumulator.add([losses[0], lambda: losses[1]])
        assert equal(self.everything(), before)
        assert len(self.accumulator) == added_to

    @rule(drawn=factors(), closures=st.booleans(), late=st.booleans())
    def failed(self, drawn: list[float | None], closures: bool, late: bool) -> None:
        """A step that fails in the last task's forward pass, in a backward pass, or when all is computed."""
        self.net.requires_grad_(True)
        before = self.everything()
        losses = self.losses(self.batch(), drawn, closures, named=False)
        last, fails = max(k for k, factor in enumerate(drawn) if factor is not None), RuntimeError("planted")
        if not late and closures:
            losses[last] = mock.Mock(side_effect=fails)
        elif not late:
            for loss in losses:  # a task whose loss weight is 0 has no backward pass
                if loss is not None:
                    loss.register_hook(mock.Mock(side_effect=fails))
        at_the_end = mock.patch.object(_grad, "commit", side_effect=fails) if late else nullcontext()
        with at_the_end, pytest.raises(RuntimeError, match="planted"):
            mtlfast.backward(losses, self.aggregator, shared=self.net.first, weighting=self.weighting)
        assert equal(self.everything(), before)

    @invariant()
    def states_are_those_of_the_model(self) -> None:
        if not hasattr(self, "aggregator"):
            return
        for ours, theirs in ((self.aggregator, self.model.aggregator), (self.weighting, self.model.weighting)):
            states = state_of(ours), state_of(theirs)
            assert states[0].keys() == states[1].keys()
            assert all(close(states[0][name], states[1][name]) for name in states[0])
        if self.name in SHAPES and self.model.known:
            assert self.aggregator.state.shape == SHAPES[self.name](self.model.known)
        assert not self.hooks


def test_any_sequence_of_steps():
    examples = max(1, round(120 * float(os.environ.get("MTLFAST_EXAMPLES", "1"))))
    run_state_machine_as_test(
        seed(zlib.crc32(SEED.encode()))(Steps),
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            database=None,
            deadline=None,
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        ),
    )
