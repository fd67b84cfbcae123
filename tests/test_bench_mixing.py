"""benchmarks/bench_mixing.py: its contestants do the same step, and its tables say what the numbers say."""

import json
import sys

import at_benchmarks
import bench_mixing
import mixing_report
import mixing_ways
import pytest
import torch
from mixing_ways import AUTO, DISJOINT, EACH_SAMPLE, FORCED, OURS, QUICK, STORED, THEIRS, TORCHJD
from step_ways import BARE, PLAIN, Passes


def gradients(num_tasks):
    """What each contestant leaves in `.grad` of the trunk, and how mtlfast computed it."""
    found, plans = {}, {}
    for name, contestant in mixing_ways.ways(num_tasks, QUICK["tiny-transformer"], Passes()).items():
        plans[name] = bench_mixing.plan(contestant.step())
        of_trunk = [p.grad for p in contestant.model.trunk.parameters()]
        found[name] = torch.cat([torch.empty(0) if g is None else g.flatten() for g in of_trunk])
        for parameter in contestant.model.parameters:
            parameter.grad = None
    return found, plans


def apart(theirs, ours):
    """How far a peer's update is away, of its length. TorchJD's weights of UPGrad differ in the fourth digit."""
    return ((theirs - ours).norm() / ours.norm()).item()


@pytest.mark.filterwarnings(at_benchmarks.VMAP)
def test_the_contestants_do_the_same_step():
    found, plans = gradients(2)
    for name in (AUTO, FORCED):
        torch.testing.assert_close(found[name], found[STORED], rtol=1e-4, atol=1e-6, msg=name)
    assert apart(found[TORCHJD], found[STORED]) < 1e-3
    assert (plans[STORED], plans[FORCED]) == ("stored", "mixing")
    assert found[BARE].numel() == 0
    assert not torch.allclose(found[DISJOINT], found[STORED], rtol=1e-2)  # another A
    assert not torch.allclose(found[PLAIN], found[STORED], rtol=1e-2)


@pytest.mark.filterwarnings(at_benchmarks.VMAP)
def test_autogram_does_the_same_step_for_samples_as_tasks():
    found, plans = gradients(EACH_SAMPLE)
    assert apart(found[THEIRS + "UPGrad"], found[OURS + "UPGrad"]) < 1e-3
    assert plans[OURS + "UPGrad"] == plans[OURS + "MGDA"] == "mixing"


@pytest.mark.filterwarnings(at_benchmarks.VMAP)
@pytest.mark.long
def test_everything_is_measured_shown_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    saved, picture = tmp_path / "mixing.json", tmp_path / "images" / "mixing.svg"
    options = ["--quick", "--no-memory", "--json", str(saved), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["bench_mixing.py", *options])
    bench_mixing.main()
    printed = capsys.readouterr().out
    cells = json.loads(saved.read_text())["cells"]
    assert [(cell["K"], cell["each sample"]) for cell in cells] == [(2, False), (5, False), (4, True)]
    for cell in cells:
        assert cell["refused"] == {}
        for way in cell["ways"].values():
            assert len(way["step"]) == 2
            assert way["flops"] > 0
    assert len(cells[0]["ways"][AUTO]["first"]) == 2
    assert f"| tiny-transformer | 2 | {AUTO} |" in printed
    drawn = picture.read_text()
    assert all(f">{word}<" in drawn for word in ("K passes", "TorchJD", "mixing=, any A", "tasks"))
    again = tmp_path / "again.svg"
    monkeypatch.setattr(sys, "argv", ["bench_mixing.py", "--load", str(saved), "--plot", str(again)])
    bench_mixing.main()
    assert capsys.readouterr().out == printed
    assert again.read_text() == drawn


def test_flops_count_the_products_of_gradients():
    contestants = mixing_ways.ways(2, QUICK["tiny-transformer"], Passes())
    of = {name: bench_mixing.all_flops(contestants[name]) for name in (PLAIN, BARE, STORED)}
    size = sum(p.numel() for p in contestants[PLAIN].model.trunk.parameters())
    assert of[STORED] - of[BARE] >= 6 * size  # K (K + 1) P of the Gram matrix
    assert of[BARE] == pytest.approx(5 / 3 * of[PLAIN], rel=0.05)  # a forward pass is half of a backward pass


def cell(trunk="mlp-64", K=8, **changes):
    """A cell in which every step takes 1 s, but for the ways in `changes`."""
    way = {"step": [1.0] * 5, "first": [], "peak": 40, "flops": 100, "plan": "mixing"}
    names = (PLAIN, BARE, STORED, AUTO, FORCED, DISJOINT, TORCHJD)
    ways = {name: way | changes.get(name, {}) for name in names}
    return {"trunk": trunk, "K": K, "each sample": False, "P": 10, "refused": {}, "ways": ways}


def test_a_limit_is_met_or_missed():
    slow = {"step": [1.3, 1.4, 1.5, 1.5, 1.5], "peak": 80}
    rows = mixing_report.limits([cell(**{AUTO: slow, FORCED: {"flops": 130}}), cell("mlp-256")]).rows
    found = {(row["trunk"], row["of"]): row for row in rows}
    step = found["mlp-64", f"step, {AUTO} / {PLAIN}"]
    assert step["ratio"][1] == 1.5
    assert step[""] == "met"  # by the better end
    assert found["mlp-64", f"FLOPs, {FORCED} / {PLAIN}"][""] == "missed by 0.050"
    assert found["mlp-64", f"memory / P 4, {AUTO} / {PLAIN}"]["ratio"] == [1.0] * 3  # 40 bytes more, of 40
    assert found["mlp-64", f"memory / P 4, {AUTO} / {PLAIN}"][""] == "missed by 0.500"
    assert found["mlp-64", f"memory / K P 4, {AUTO} / {PLAIN}"]["ratio"] == [1 / 8] * 3
    assert {row[""] for row in rows if row["trunk"] == "mlp-256"} == {"met"}


def test_two_tasks_with_many_rows_must_take_ordinary_passes():
    large = "transformer-32x64"
    for plan, verdict in (("mixing", "missed"), ("stored", "met"), ("implicit", "met")):
        *_, row = mixing_report.limits([cell(large, 2, **{AUTO: {"plan": plan}})]).rows
        assert (row["limit"], row[""]) == ("not mixing", verdict)
    assert all(row["limit"] != "not mixing" for row in mixing_report.limits([cell(large, 8)]).rows)


def test_the_trunks_are_those_of_the_table():
    assert {name: size.shape for name, size in mixing_ways.TRUNKS.items()} == {
        "transformer-8x16": (8, 16, 512),
        "transformer-16x32": (16, 32, 512),
        "transformer-32x64": (32, 64, 512),
        "mlp-64": (64, 1024),
        "mlp-256": (256, 1024),
    }
