"""benchmarks/bench_step.py: its contestants do the same step, and its tables say of a limit what the numbers say."""

import json
import sys

import at_benchmarks
import bench_step
import pytest
import step_report
import step_ways
import torch
from step_ways import QUICK, Passes

import mtlfast
from mtlfast.bench.timing import median_interval, take_turns
from mtlfast.compat.pcgrad import PCGrad


@pytest.fixture(scope="module")
def gradients() -> dict[str, torch.Tensor]:
    """What each contestant leaves in `.grad` of two tasks, which conflict and have one order of projections alone."""
    contestants, parameters = step_ways.ways(2, QUICK, Passes())
    found = {}
    for name, contestant in contestants.items():
        contestant()
        none = torch.full((1,), torch.nan)
        found[name] = torch.cat([none if p.grad is None else p.grad.flatten() for p in parameters])
        for parameter in parameters:
            parameter.grad = None
    return found


@pytest.mark.filterwarnings(at_benchmarks.VMAP)
def test_the_contestants_do_the_same_step(gradients):
    ours = gradients[step_ways.LOSSES]
    for name in (step_ways.TORCHJD, step_ways.TORCHJD + step_ways.AT_ONCE, step_ways.ACCUMULATOR):
        torch.testing.assert_close(gradients[name], ours, rtol=1e-4, atol=1e-6, msg=name)
    model = step_ways.Model(2, QUICK, Passes())
    PCGrad(torch.optim.SGD(model.parameters, lr=0.1)).pc_backward(model.losses()[1])
    face = torch.cat([p.grad.flatten() for p in model.parameters])  # which is compared with the original elsewhere
    torch.testing.assert_close(gradients[step_ways.PYTORCH_PCGRAD], face, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours, gradients[step_ways.PLAIN], rtol=1e-2)  # the tasks conflict
    for parameter in model.parameters:
        parameter.grad = None
    mtlfast.backward(model.own_losses(), mtlfast.aggregation.PCGrad(), shared=model.trunk)
    separate = torch.cat([p.grad.flatten() for p in model.parameters])
    torch.testing.assert_close(gradients[step_ways.CLOSURES], separate, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(separate, ours, rtol=1e-2)  # the batches differ
    for name in (step_ways.BARE, step_ways.HELD, step_ways.BARE_EACH, step_ways.BARE_MICRO):
        assert gradients[name].isnan().all()


@pytest.mark.long
def test_everything_is_measured_shown_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    saved, picture = tmp_path / "step.json", tmp_path / "images" / "step.svg"
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--quick", "--json", str(saved), "--picture", str(picture)])
    monkeypatch.setenv("COLUMNS", "80")
    bench_step.main()
    printed = capsys.readouterr().out
    assert "\u2026" not in printed  # no word is cut
    (ways,) = json.loads(saved.read_text())["tasks"].values()
    for way in ways.values():
        assert len(way["step"]) == len(way["forward"]) == len(way["backward"]) == 2
        assert min(step_report.seconds(way, "surgery")) > 0
        assert min(way["forward"]) > 0
        assert min(way["backward"]) > 0
        assert way["peak"] is None or way["peak"] >= 0
    drawn = picture.read_text()
    assert all(f">{word}<" in drawn for word in ("forward", "backward", "surgery", "Pytorch-PCGrad", "mtlfast"))
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--load", str(saved), "--picture", str(tmp_path / "again.svg")])
    bench_step.main()
    assert capsys.readouterr().out == printed
    assert (tmp_path / "again.svg").read_text() == drawn


def test_a_limit_is_met_or_missed():
    contestants, _ = step_ways.ways(2, QUICK, Passes())
    way = {"step": [3.0, 6.0, 9.0], "forward": [1.0, 2.0, 3.0], "backward": [1.5, 3.0, 4.5], "peak": None}
    ways = {name: dict(way) for name in contestants}
    ways[step_ways.LOSSES] = way | {"step": [3.1, 6.2, 9.3]}  # 5 % more beside the forward passes
    ways[step_ways.TORCHJD] = way | {"step": [9.0, 9.0, 9.0]}  # its other setting is faster
    ways[step_ways.PYTORCH_PCGRAD] = way | {"step": [7.0, 15.6, 20.0]}
    rows = {(row["K"], row["time of"], row["over"]): row for row in step_report.ratios({2: ways, 8: ways}).rows}
    row = rows[8, step_ways.LOSSES, step_ways.BARE]
    assert row["ratio"] == pytest.approx([1.05] * 3)
    assert (row["limit"], row[""]) == ("<= 1.03", "missed")
    row = rows[8, step_ways.TORCHJD, step_ways.LOSSES]
    assert row["ratio"] == pytest.approx([3 / 3.1] * 3)
    assert (row["limit"], row[""]) == (">= 1", "missed")
    row = rows[8, step_ways.PYTORCH_PCGRAD, step_ways.LOSSES]
    assert row["ratio"][1] < 2.5 < row["ratio"][2]
    assert (row["limit"], row[""]) == (">= 2.5", "met")
    assert rows[2, step_ways.PYTORCH_PCGRAD, step_ways.LOSSES]["limit"] == ""
    assert rows[2, step_ways.CLOSURES, step_ways.BARE_EACH][""] == "met"
    assert step_report.seconds(way, "surgery") == [0.5, 1.0, 1.5]


def test_only_autograds_calls_count_as_backward_passes():
    passes, x = Passes(), torch.ones(2, requires_grad=True)
    grad = torch.autograd.grad
    with passes.watch():
        assert passes.backward == 0
        x.sum().backward()
        first = passes.backward
        assert first > 0
        torch.autograd.grad(x.sum(), x)
        assert passes.backward > first
        assert passes.forward == 0
    assert torch.autograd.grad is grad


def test_the_interval_is_that_of_the_median():
    low, median, high = median_interval([float(i) for i in range(1, 31)])
    # The exact interval by order statistics is from the 10th to the 21st.
    assert median == 15.5
    assert 9 < low < 12
    assert 19 < high < 22
    assert median_interval([2.0, 2.0, 2.0]) == [2.0, 2.0, 2.0]


def test_rounds_begin_one_contestant_later():
    order = []
    take_turns({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3, warmups=1, rotate=True)
    assert "".join(order) == "abcbcacababc"
