"""Backward passes of the implicit way that fail: the step leaves everything as it was, or takes another sweep."""

import pytest
import torch
from implicit_steps import WEIGHTS, Tasks, assert_exact, mlp, step

import mtlfast
from mtlfast.aggregation import Constant, GradVac, NashMTL
from mtlfast.jacobian import _plan
from mtlfast.weighting import UW

pytestmark = pytest.mark.native


class Planted(Exception):
    """What no code expects."""


@pytest.fixture
def model():
    return Tasks(mlp(16, 2), 16, 3).double()


X = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def calls_of(monkeypatch, fails, error):
    """Counts the calls of `torch.autograd.grad`, of which those that `fails(n, batched)` says end with an error."""
    ordinary, counts = torch.autograd.grad, {"all": 0, "batched": 0}

    def grad(*arguments, **options):
        batched = options.get("is_grads_batched", False)
        counts["all"] += 1
        counts["batched"] += batched
        gradients = ordinary(*arguments, **options)
        if fails(counts["all"], batched):
            raise error  # after the pass, so that its graph is gone unless it was to be kept
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return counts


def passes(sweep):
    return 4 if sweep == "batched" else 3  # of the heads, and of the trunk


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("sweep", ["batched", "sequential"])
def test_a_failure_in_the_middle_changes_nothing(monkeypatch, model, sweep, after, weighted):
    """The n-th pass fails, for every n, in the first step or in a later one."""
    if sweep == "sequential":
        model.trunk[1].register_full_backward_hook(lambda *_: None)
    for make in (NashMTL, GradVac):
        aggregator, weighting = make(), UW(3) if weighted else None
        model.zero_grad()

        def run(aggregator=aggregator, weighting=weighting):
            return mtlfast.backward(
                model.losses(X), aggregator, shared=model.trunk, jacobian="implicit", weighting=weighting
            )

        for _ in range(after):
            assert run().plan.sweep == sweep
        leaves = [*model.parameters(), *(() if weighting is None else weighting.parameters())]
        grads = [None if p.grad is None else (p.grad, p.grad.clone()) for p in leaves]
        state = {name: x.clone() for name, x in aggregator.state_dict().items() if isinstance(x, torch.Tensor)}
        for n in range(1, passes(sweep) + weighted + 1):
            with monkeypatch.context() as patch:
                counts = calls_of(patch, lambda call, batched, n=n: call == n, Planted())
                with pytest.raises(Planted):
                    run()
            assert counts["all"] == n
            for p, before in zip(leaves, grads, strict=True):
                assert (p.grad is None) if before is None else (p.grad is before[0] and torch.equal(*before)), n
            for name, x in state.items():
                assert torch.equal(aggregator.state_dict()[name], x), name
        with monkeypatch.context() as patch:
            counts = calls_of(patch, lambda call, batched: False, Planted())
            run()
        assert counts["all"] == passes(sweep) + weighted  # one of the weighting's own


def test_an_error_of_the_method_changes_nothing(model):
    class Fails(Constant):
        def solve(self, gram, step):
            raise Planted

        def weigh(self, *_, **__):
            raise Planted

    with pytest.raises(Planted):
        mtlfast.backward(model.losses(X), Fails(WEIGHTS[:3]), shared=model.trunk, jacobian="implicit")
    assert all(p.grad is None for p in model.parameters())
    assert_exact(lambda: model.losses(X), model, shared=model.trunk)


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("planted\nin two lines"), "planted"), (NotImplementedError(), "NotImplementedError")],
)
def test_batched_passes_that_fail_become_sequential_and_that_is_remembered(monkeypatch, model, error, said):
    _, expected = step(lambda: model.losses(X), model, "stored", shared=model.trunk)
    counts = calls_of(monkeypatch, lambda call, batched: batched, error)
    for attempt in range(3):
        counts["all"] = 0
        result, got = step(lambda: model.losses(X), model, "implicit", shared=model.trunk)
        assert result.plan.sweep == "sequential"
        assert result.plan.sweep_reason == f"torch cannot run it for all tasks at once: {said}"
        assert counts == {"all": 7 if attempt == 0 else 3, "batched": 1}
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_an_error_of_batched_passes_that_have_succeeded_before_is_raised(monkeypatch, model):
    step(lambda: model.losses(X), model, "implicit", shared=model.trunk)
    model.zero_grad()
    calls_of(monkeypatch, lambda call, batched: batched, RuntimeError("planted"))
    with pytest.raises(RuntimeError, match=r"^planted$"):
        mtlfast.backward(model.losses(X), Constant(WEIGHTS[:3]), shared=model.trunk, jacobian="implicit")
    assert all(p.grad is None for p in model.parameters())


def test_batched_passes_stay_while_torch_warns_of_functions_that_it_runs_task_by_task(model):
    """torch does so for tanh and many others, and warns where a user has asked for that."""
    before = torch._C._debug_only_are_vmap_fallback_warnings_enabled()
    torch._C._debug_only_display_vmap_fallback_warnings(True)
    try:
        for _ in range(3):
            with pytest.warns(UserWarning, match="performance drop"):
                plan = assert_exact(lambda: model.losses(X), model, shared=model.trunk).plan
            assert plan.sweep == "batched"
    finally:
        torch._C._debug_only_display_vmap_fallback_warnings(before)


def test_a_failed_step_leaves_nothing_behind(monkeypatch, model):
    """Neither the cached plan nor the layers' inputs keep a step's tensors."""
    with monkeypatch.context() as patch:
        calls_of(patch, lambda call, batched: call == 2, Planted())
        with pytest.raises(Planted):
            mtlfast.backward(model.losses(X), Constant(WEIGHTS[:3]), shared=model.trunk, jacobian="implicit")
    (chosen,) = _plan._cache[next(model.trunk.parameters())].values()
    assert (chosen.not_batched, chosen.proven) == ("", False)
    assert assert_exact(lambda: model.losses(X), model, shared=model.trunk).plan.sweep == "batched"
