"""ExcessMTL beside TorchJD's: mtlfast's own class, and TorchJD's under `accelerate()` with its state where it was."""

import copy

import pytest
import torch
from torch import nn

from mtlfast import ops
from mtlfast.aggregation import ExcessMTL
from mtlfast.compat.torchjd import accelerate

jd = pytest.importorskip("torchjd.aggregation", reason="needs the optional group peers")
autojac = pytest.importorskip("torchjd.autojac", reason="needs the optional group peers")
if not hasattr(jd, "ExcessMTL"):
    pytest.skip("needs a torchjd with ExcessMTL", allow_module_level=True)

SETTINGS = [(), (0.3, 3), (5.0, 1)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
BUFFERS = ("_weights", "_sq_grad_sum", "_initial_w", "_warmup_w_sum")


def jacobians(count: int, dtype: torch.dtype, shape=(4, 30)) -> list[torch.Tensor]:
    lengths = torch.tensor([1.0, 0.1, 0.5, 0.2], dtype=dtype)[: shape[0], None]
    return [torch.randn(shape, dtype=dtype) * lengths for _ in range(count)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_directions_but_for_torchjds_epsilon(settings):
    class WithEpsilon(ExcessMTL):
        _eps = 1e-7

    theirs, ours, without = jd.ExcessMTL(*settings), WithEpsilon(*settings), ExcessMTL(*settings)
    for J in jacobians(30, torch.float64):
        wanted = theirs(J)
        torch.testing.assert_close(ours(J), wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(without(J), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_accelerated_steps_are_torchjds_with_its_buffers(settings, dtype, monkeypatch):
    theirs, fast = jd.ExcessMTL(*settings), jd.ExcessMTL(*settings)
    calls = []
    original = ops.excess_risks
    monkeypatch.setattr(ops, "excess_risks", lambda *a, **k: calls.append(1) or original(*a, **k))
    for step, J in enumerate(jacobians(12, dtype)):
        wanted = theirs(J)
        with accelerate() if step != 7 else _nothing():  # TorchJD goes on with the state, and mtlfast after it
            got = fast(J)
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[dtype])
        for name in BUFFERS:
            one, other = getattr(fast.weighting, name), getattr(theirs.weighting, name)
            assert (one is None) == (other is None)
            assert one is None or one.dtype == dtype
            torch.testing.assert_close(one, other, rtol=10 * TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert fast.weighting._n_steps == theirs.weighting._n_steps == step + 1
    assert len(calls) == 11
    fast.reset()
    with accelerate():
        torch.testing.assert_close(fast(J), jd.ExcessMTL(*settings)(J), rtol=0, atol=TOLERANCE[dtype])


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize("hooked", [False, True])
def test_jac_to_grad_reads_the_jacobians_where_they_are(hooked):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    fast = copy.deepcopy(plain)
    theirs, mine = jd.ExcessMTL(), jd.ExcessMTL()
    seen = []
    if hooked:
        mine.weighting.register_forward_hook(lambda module, given, weights: seen.append(given[0].shape))
    for _ in range(4):
        x = torch.randn(6, 3)
        results = []
        for net, aggregator, on in ((plain, theirs, False), (fast, mine, True)):
            with accelerate() if on else _nothing():
                net.zero_grad()
                autojac.backward(list(net(x).square().mean(dim=0)))
                results.append(autojac.jac_to_grad(net.parameters(), aggregator))
        torch.testing.assert_close(*results)
        for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert len(seen) == (4 if hooked else 0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_as_in_torchjd(bad):
    theirs, mine = jd.ExcessMTL(), jd.ExcessMTL()
    for step, J in enumerate(jacobians(4, torch.float64)):
        if step == 2:
            J[1, 3] = bad
        wanted = theirs(J)
        with accelerate():
            torch.testing.assert_close(mine(J), wanted, equal_nan=True)
    torch.testing.assert_close(mine.weighting._sq_grad_sum, theirs.weighting._sq_grad_sum, equal_nan=True)


def test_half_precision_is_torchjds():
    theirs, mine = jd.ExcessMTL(), jd.ExcessMTL()
    for J in jacobians(3, torch.bfloat16):
        wanted = theirs(J)
        with accelerate():
            assert torch.equal(mine(J), wanted)
