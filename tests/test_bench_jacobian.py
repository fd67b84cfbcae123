"""benchmarks/bench_jacobian.py: its contestants do the same step, and its tables say what the numbers say."""

import json
import sys

import at_benchmarks
import bench_jacobian
import jacobian_report
import jacobian_ways
import pytest
import torch
from jacobian_trunks import QUICK, TRUNKS
from jacobian_ways import AUTO, AUTOGRAM, BATCHED, SEQUENTIAL, STORED
from step_ways import AT_ONCE, BARE, PLAIN, PYTORCH_PCGRAD, TORCHJD, Passes

import mtlfast
from mtlfast.jacobian import _implicit


@pytest.mark.usefixtures("every_size")
@pytest.mark.filterwarnings(at_benchmarks.VMAP)
def test_the_contestants_do_the_same_step():
    contestants = jacobian_ways.ways(2, QUICK["tiny-transformer"], Passes())
    found, sweeps = {}, {}
    for name, contestant in contestants.items():
        result = contestant.step()
        gradients = [p.grad for p in contestant.model.trunk.parameters()]
        found[name] = torch.cat([torch.empty(0) if g is None else g.flatten() for g in gradients])
        for parameter in contestant.model.parameters:
            parameter.grad = None
        if isinstance(result, mtlfast.StepResult):
            sweeps[name] = result.plan.sweep
    for name in (SEQUENTIAL, BATCHED, AUTO, TORCHJD, TORCHJD + AT_ONCE, AUTOGRAM):
        torch.testing.assert_close(found[name], found[STORED], rtol=1e-4, atol=1e-6, msg=name)
    assert found[BARE].numel() == 0
    assert not torch.allclose(found[PLAIN], found[STORED], rtol=1e-2)  # the tasks conflict
    assert sweeps == {STORED: "", SEQUENTIAL: "sequential", BATCHED: "batched", AUTO: "batched"}


def test_the_switch_to_one_pass_after_the_other_is_put_back():
    why_not = _implicit.why_not
    jacobian_ways.ways(2, QUICK["tiny-resnet"], Passes())[SEQUENTIAL].step()
    assert _implicit.why_not is why_not


def test_an_engine_that_fails_or_is_wrong_is_left_out():
    contestants = jacobian_ways.ways(2, QUICK["tiny-resnet"], Passes())
    assert jacobian_ways.why_without_autogram(contestants) == ""
    engine = contestants[AUTOGRAM]

    def doubled(features, losses):
        return 2 * engine.backward(features, losses)

    def broken(features, losses):
        raise ValueError("no such layer\nand more")

    wrong = jacobian_ways.why_without_autogram(contestants | {AUTOGRAM: engine._replace(backward=doubled)})
    assert wrong.startswith("its G is 1 of")
    failed = jacobian_ways.why_without_autogram(contestants | {AUTOGRAM: engine._replace(backward=broken)})
    assert failed == "ValueError: no such layer"


@pytest.mark.usefixtures("every_size")
def test_flops_are_those_of_the_backward_passes():
    contestants = jacobian_ways.ways(2, QUICK["tiny-transformer"], Passes())
    of = {name: bench_jacobian.flops(contestants[name]) for name in (PLAIN, BARE, STORED, AUTO)}
    assert of[BARE] == pytest.approx(2 * of[PLAIN], rel=0.02)  # the heads have one pass in both
    assert of[BARE] <= of[STORED] < 1.02 * of[BARE]
    assert of[AUTO] < of[STORED]


def test_the_trunks_are_those_of_the_table():
    sizes = {name: sum(p.numel() for p in size.trunk().parameters()) for name, size in TRUNKS.items()}
    assert len(sizes) == 8
    assert sizes["24-blocks-2x16"] == pytest.approx(50e6, rel=0.01)
    for size in QUICK.values():
        assert size.trunk()(torch.randn(size.shape)).shape == (size.shape[0], size.width)


@pytest.mark.long
def test_everything_is_measured_shown_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_jacobian, "QUICK", {"tiny-transformer": QUICK["tiny-transformer"]})
    saved, picture = tmp_path / "jacobian.json", tmp_path / "images" / "jacobian.svg"
    monkeypatch.setattr(sys, "argv", ["bench_jacobian.py", "--quick", "--json", str(saved), "--plot", str(picture)])
    bench_jacobian.main()
    printed = capsys.readouterr().out
    (found,) = json.loads(saved.read_text())["cells"]
    assert (found["trunk"], found["K"], found["refused"]) == ("tiny-transformer", 2, {})
    for way in found["ways"].values():
        assert len(way["step"]) == 2
        assert way["flops"] > 0
        assert way["peak"] is None or way["peak"] >= 0
    assert f"| tiny-transformer | 2 | {AUTO} |" in printed
    drawn = picture.read_text()
    assert all(f">{word}<" in drawn for word in ("forward", "mtlfast auto", "Pytorch-PCGrad", "TorchJD autogram"))
    again = tmp_path / "again.svg"
    monkeypatch.setattr(sys, "argv", ["bench_jacobian.py", "--load", str(saved), "--plot", str(again)])
    bench_jacobian.main()
    assert capsys.readouterr().out == printed
    assert again.read_text() == drawn


def cell(trunk="mlp-32", K=8, **changes):
    """A cell in which every way takes 1 s forward and 2 s otherwise, but for those whose step is in `changes`."""
    way = {"step": [3.0] * 5, "forward": [1.0] * 5, "backward": [1.5] * 5, "peak": 64, "flops": 100, "plan": ""}
    names = (PLAIN, BARE, STORED, SEQUENTIAL, BATCHED, AUTO, TORCHJD, TORCHJD + AT_ONCE, PYTORCH_PCGRAD)
    return {"trunk": trunk, "K": K, "P": 10, "refused": {}, "ways": {x: way | changes.get(x, {}) for x in names}}


def test_a_limit_is_met_or_missed():
    slow = {"step": [2.0, 2.0, 2.2, 2.4, 2.4], "peak": 96, "flops": 50}  # 1 to 1.4 s beside the forward pass
    rows = jacobian_report.limits([cell(**{BATCHED: slow, AUTO: {"flops": 101}}), cell(K=2)]).rows
    found = {(row["K"], row["of"]): row for row in rows}
    assert found[8, f"passes, {BATCHED} / {BARE}"]["ratio"] == pytest.approx([0.5, 0.6, 0.7])
    assert found[8, f"passes, {BATCHED} / {BARE}"][""] == "met"  # by the better end
    assert found[8, f"step, {BATCHED} / {PLAIN}"][""] == "met"
    assert found[8, f"memory, {BATCHED} / K P 4"]["ratio"] == pytest.approx([0.3] * 3)
    assert found[8, f"memory, {BATCHED} / K P 4"][""] == "missed by 0.050"
    assert found[8, f"FLOPs, {AUTO} / {STORED}"][""] == "missed by 0.010"
    assert [row["of"] for row in rows if row["K"] == 2] == [f"FLOPs, {AUTO} / {STORED}"]  # the others are for K = 8


def test_rows_of_auto_above_stored_are_named():
    cells = [
        cell(**{AUTO: {"step": [3.0, 3.0, 3.4, 3.5, 3.5]}}),
        cell("resnet-32", **{AUTO: {"step": [3.2] * 5}}),
    ]
    section = jacobian_report.auto_over_stored(cells)
    assert [row["above 1.05"] for row in section.rows] == ["", "above"]
    assert section.caption.endswith("Rows above it: resnet-32 at K = 8.")


def test_what_was_not_measured_has_an_empty_cell():
    without = cell() | {"refused": {AUTOGRAM: "ValueError: no"}}
    for way in without["ways"].values():
        way["peak"] = None
    lines = jacobian_report.markdown(jacobian_report.multiples([without])).splitlines()
    assert f"| mlp-32 | 8 | {AUTOGRAM} |  |  |  |  | left out: ValueError: no |" in lines
    assert f"| mlp-32 | 8 | {PLAIN} | 1.00 | 1.00 | 1.00 |  |  |" in lines
    assert len(lines) == 4 + 8 + 1 + 2  # TorchJD has one line
