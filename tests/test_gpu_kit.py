"""The GPU kit without a GPU: steps that fail or are late, what a run leaves, the timer, measurements on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

KIT = Path(__file__).parents[1] / "benchmarks" / "gpu"
if not KIT.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(KIT))
import kit  # noqa: E402
import measure  # noqa: E402
from report import render  # noqa: E402

from mtlfast.bench.timing import take_turns  # noqa: E402

RECORDED = ["-p", "outcomes", "--outcomes", "RESULT"]


def python(name: str, code: str, seconds: float = 20) -> kit.Step:
    return kit.Step(name, seconds, [sys.executable, "-c", code])


def test_a_step_that_fails_or_is_late_is_recorded_and_the_rest_still_run(tmp_path):
    plan = [
        python("fails", "print('because'); raise SystemExit(3)"),
        python("late", "import time; print('begun', flush=True); time.sleep(60)", seconds=3),
        kit.Step("missing", 5, ["no-such-program"]),
        python("rows", "open('RESULT', 'w').write('[{\"K\": 2, \"us\": 1.5}]')"),
        python("garbage", "open('RESULT', 'w').write('[{\"K\"')"),
    ]
    outcomes = {outcome.name: outcome for outcome in kit.run_all(plan, tmp_path)}
    assert outcomes["fails"].status == "failed (3)"
    assert "because" in outcomes["fails"].output
    assert outcomes["late"].status == "late (cut off after 3 s)"
    assert "begun" in outcomes["late"].output
    assert outcomes["missing"].status.startswith("failed (")
    assert outcomes["rows"].result == [{"K": 2, "us": 1.5}]
    assert outcomes["garbage"].result is None
    report = (tmp_path / "report.md").read_text()
    assert "| fails | failed (3) |" in report
    assert "| K | us |\n|---|---|\n| 2 | 1.5 |" in report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "results.json"]


@pytest.mark.parametrize("bad", [step.name for step in kit.steps()])
def test_any_step_may_fail_alone(bad, tmp_path):
    plan = [kit.Step(step.name, 20, ["false" if step.name == bad else "true"]) for step in kit.steps()]
    outcomes = kit.run_all(plan, tmp_path)
    assert {outcome.name: outcome.status for outcome in outcomes} == {
        step.name: "failed (1)" if step.name == bad else "ok" for step in plan
    }
    assert [step["name"] for step in json.loads((tmp_path / "results.json").read_text())["steps"]] == [
        step.name for step in plan
    ]
    assert f"| {bad} | failed (1) |" in (tmp_path / "report.md").read_text()


def test_what_a_cut_off_step_had_measured_is_kept(tmp_path):
    code = "import time; open('RESULT', 'w').write('[{\"K\": 2}]'); time.sleep(60)"
    (outcome,) = kit.run_all([python("slow", code, seconds=3)], tmp_path)
    assert outcome.status.startswith("late")
    assert outcome.result == [{"K": 2}]


def running(pid: int) -> bool:
    """Whether the process runs, and is not a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_late_tests_are_counted_as_far_as_they_came_and_nothing_of_them_goes_on(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import subprocess, time\n"
        "def test_a(): pass\n"
        "def test_b():\n"
        f"    subprocess.Popen(['sh', '-c', 'trap \"\" INT; echo $$ > {tmp_path}/child; exec sleep 60'])\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-c", "/dev/null", *RECORDED]
    (outcome,) = kit.run_all([kit.Step("tests", 6, command)], tmp_path / "out")
    assert outcome.status == "late (cut off after 6 s)"
    assert outcome.result["passed"] == 1
    deadline = time.monotonic() + 10
    while running(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline


def test_no_step_begins_without_time(tmp_path):
    first, second = kit.run_all([python("first", ""), python("second", "")], tmp_path, budget=5.01)
    assert first.status == "ok"
    assert second.status == "skipped (no time left)"


def test_both_files_are_written_after_every_step(tmp_path):
    seen = f"import json; print(len(json.load(open({str(tmp_path / 'results.json')!r}))['steps']))"
    outcomes = kit.run_all([python("first", ""), python("second", seen)], tmp_path)
    assert outcomes[1].output.strip() == "1"


def test_pytest_is_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-c", "/dev/null", *RECORDED]
    (outcome,) = kit.run_all([kit.Step("tests", 60, command)], tmp_path / "out")
    assert outcome.status == "failed (1)"
    assert (outcome.result["passed"], outcome.result["failed"], outcome.result["skipped"]) == (1, 1, 1)
    assert "assert 1 == 2" in outcome.result["failures"][0]["why"]
    assert "1 passed, 1 failed, 1 skipped." in (tmp_path / "out" / "report.md").read_text()


def test_the_steps_fit_the_budget_in_order_of_value():
    names = [step.name for step in kit.steps()]
    assert names[:5] == ["device", "build", "tests", "bandwidth", "ops"]
    assert {"peers", "memcheck", "racecheck", "initcheck", "step"} < set(names)
    assert kit.BUDGET < 9 * 60


def test_arguments():
    run = subprocess.run([sys.executable, KIT / "kit.py"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "the following arguments are required: out" in run.stderr


class FakeEvent:
    """Reads a clock that the runs below move, in milliseconds."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.at - self.at


def test_on_a_gpu_events_are_timed_in_turn_without_the_warmups(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    order = []

    def run(name: str, milliseconds: list[float]):
        def work() -> None:
            order.append(name)
            FakeEvent.clock += milliseconds.pop(0)

        return work

    contestants = {"a": run("a", [9, 9, 1, 2, 3, 4, 5]), "b": run("b", [7] * 7)}
    times = take_turns(contestants, rounds=5, warmups=2, device="cuda")
    assert order == ["a", "b"] * 7
    assert times["a"].seconds == pytest.approx((0.001, 0.002, 0.003, 0.004, 0.005))
    assert (times["a"].median, *times["a"].quartiles) == pytest.approx((0.003, 0.002, 0.004))
    assert times["b"].ratio_to(times["b"]) == (1, 1, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("name", ["bandwidth", "ops", "solvers", "models", "peers", "compiled"])
def test_measurements_run_on_the_cpu(name, monkeypatch):
    for key, value in {
        "DEVICE": "cpu",
        "ELEMENTS": 2000,
        "COPIED": 1000,
        "TASKS": (2, 32),
        "MODELS": {"tiny": [30, 4, 1]},
    }.items():
        monkeypatch.setattr(measure, key, value)
    torch.manual_seed(0)
    rows = list(measure.MEASUREMENTS[name]())
    assert rows
    assert "nan" not in render({"steps": [{"name": name, "status": "ok", "seconds": 1, "output": "", "result": rows}]})
    if name == "ops":
        assert {(row["K"], row["dtype"], row["layout"]) for row in rows} == {
            (K, dtype, layout)
            for K in (2, 32)
            for dtype in ("float32", "bfloat16")
            for layout in ("scattered", "matrix")
        }
        assert all(row["% of copy"] > 0 for row in rows)


def test_roofline_beside_a_run():
    sys.path.insert(0, str(KIT.parent))
    import roofline

    rows = roofline.table("H100")
    eight = next(row for row in rows if (row["op"], row["K"], row["dtype"]) == ("gram", 8, "float32"))
    assert eight["kernel"] == "gram_kernel<float, 8, float>"
    assert eight["us memory"] == round(8 * 25e6 * 4 / (3350e9 * 0.9) * 1e6)
    measured = {"op": "gram", "K": 8, "dtype": "float32", "layout": "scattered", "P": 25_000_000, "us median": 300.0}
    resnet = {"op": "PCGrad", "K": 4, "dtype": "bfloat16", "model": "ResNet-50", "P": 23_508_032, "us median": 150.0}
    steps = [{"name": "ops", "result": [measured]}, {"name": "models", "result": [resnet]}]
    roofline.compare(rows, {"steps": steps})
    assert eight["predicted / measured"] == round(eight["us predicted"] / 300, 2)
    assert [(row["op"], row["model"]) for row in rows if row["us measured"]] == [("gram", ""), ("PCGrad", "ResNet-50")]
    surgery = next(row for row in rows if (row["op"], row["K"], row["dtype"]) == ("PCGrad", 8, "float32"))
    assert surgery["us memory"] == pytest.approx(17 * 25e6 * 4 / (3350e9 * 0.9) * 1e6, abs=1)
    assert roofline.markdown(rows).count("\n") == len(rows) + 1


def test_an_output_left_unwritten_is_noticed(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    grads = measure.spread(2, 1000, torch.float32)
    measure.check_outputs(grads)
    with monkeypatch.context() as patch:
        patch.setattr(measure.ops, "combine", lambda *args, **kwargs: None)
        with pytest.raises(AssertionError, match="combine with a weight of 2"):
            measure.check_outputs(grads)
    monkeypatch.setattr(measure.ops, "gram", lambda grads: torch.full((2, 2), torch.nan))
    with pytest.raises(AssertionError, match="gram of the first and the last task is off by nan"):
        measure.check_outputs(grads)


def test_workloads_take_turns_until_they_have_left_the_cache(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    assert measure.copies_beyond_cache(100 << 20) == 3
    assert measure.copies_beyond_cache(1 << 30) == 1
    order = []
    turn = measure.rotating([lambda name=name: order.append(name) for name in "abc"])
    for _ in range(5):
        turn()
    assert "".join(order) == "abcab"
