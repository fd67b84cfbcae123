"""The GPU kit without a GPU: the order of steps, their limits, what a run leaves wherever it is cut off, the timer."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

KIT = Path(__file__).parents[1] / "benchmarks" / "gpu"
if not KIT.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(KIT))
import kit  # noqa: E402
import plan  # noqa: E402
import timed  # noqa: E402
from records import record  # noqa: E402
from workloads import GPU  # noqa: E402

from mtlfast.bench.timing import take_turns  # noqa: E402

RECORDED = ["-p", "outcomes", "--outcomes", "RESULT"]
DECISIVE = ["device", "build", "bandwidth", "smoke", "sizes", "step", "capture", "solvers", "profiles"]
THOROUGH = ["fallback", "ranks", "tests", "ops", "models", "memcheck", "peers"]
ON_REQUEST = ["racecheck", "initcheck", "compiled"]


class Machine:
    """A GPU machine with a clock of its own, on which each step takes what it is said to, or its whole limit."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.now, self.given, self.ended = seconds, 0.0, {}, {}
        self.each_second: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    def run(self, step: plan.Step, seconds: float, folder: Path, seen: kit.Seen) -> kit.Outcome:
        """Reports a row each second, as run_step does with what it has read."""
        self.given[step.name] = seconds
        wanted, start = self.seconds.get(step.name, seconds), self.now
        rows = []
        while self.now - start < min(wanted, seconds):
            self.now += 1
            rows.append({"second": self.now})
            seen(kit.Outcome(step.name, "running", self.now - start, "", list(rows)))
            self.each_second()
        self.ended[step.name] = self.now
        return kit.Outcome(step.name, "ok" if wanted <= seconds else "late", self.now - start, "", rows)

    def run_all(self, out: Path, budget: float = kit.BUDGET) -> list[kit.Outcome]:
        return kit.run_all(plan.steps(), out, budget, self.run, self.clock)


def test_the_order_of_the_steps():
    assert [step.name for step in plan.steps()] == DECISIVE + THOROUGH
    assert plan.names() == DECISIVE + THOROUGH + ON_REQUEST
    assert [step.name for step in plan.steps(["compiled", "smoke"])] == ["smoke", "compiled"]


def test_the_first_four_minutes_decide_most_however_slow_they_are(tmp_path):
    machine = Machine(build=10)  # carried
    machine.run_all(tmp_path)
    assert machine.ended["profiles"] <= 240
    assert [name for name, end in machine.ended.items() if end <= 240] == DECISIVE


def test_each_step_has_a_limit_and_all_have_the_budget(tmp_path):
    limits = {step.name: step.seconds for step in plan.steps()}
    machine = Machine()  # every step takes its whole limit, and the extension is compiled
    outcomes = machine.run_all(tmp_path)
    assert machine.now <= kit.BUDGET < 9 * 60
    assert all(seconds <= limits[name] for name, seconds in machine.given.items())
    assert list(machine.given)[: len(DECISIVE)] == DECISIVE
    assert machine.given["tests"] == kit.BUDGET - machine.ended["ranks"] < limits["tests"]
    assert [o.name for o in outcomes if o.status == "skipped (no time left)"] == THOROUGH[3:]
    report = (tmp_path / "report.md").read_text()
    assert "12 of 16 steps ended well: device, build, " in report
    assert "Not reached: ops, models, memcheck, peers." in report


def test_with_a_carried_build_on_a_quick_machine_everything_is_reached(tmp_path):
    quick = {step.name: step.seconds / 4 for step in plan.steps()}
    assert all(outcome.status == "ok" for outcome in Machine(**quick).run_all(tmp_path))
    assert "16 of 16 steps ended well" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("step", ["device", "smoke", "ops"])
def test_a_step_that_runs_out_of_time_takes_none_of_the_others(step, tmp_path):
    quick = {step.name: 3.0 for step in plan.steps()}
    outcomes = {o.name: o.status for o in Machine(**{**quick, step: 1000.0}).run_all(tmp_path)}
    assert outcomes.pop(step) == "late"
    assert set(outcomes.values()) == {"ok"}
    assert f"Late: {step}." in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("second", [1, 20, 21, 50, 100, 239, 500])
def test_a_run_that_ends_at_any_second_leaves_what_it_had(second, tmp_path):
    class PowerCut(BaseException):
        pass

    def cut() -> None:
        if machine.now == second:
            saved.update({path.name: path.read_text() for path in tmp_path.iterdir()})
            raise PowerCut

    machine, saved = Machine(), {}
    machine.each_second = cut
    with pytest.raises(PowerCut):
        machine.run_all(tmp_path)
    for files, status in ((saved, "running"), ({p.name: p.read_text() for p in tmp_path.iterdir()}, "cut off")):
        steps = json.loads(files["results.json"])["steps"]
        assert [row["second"] for step in steps for row in step["result"]] == list(range(1, second + 1))
        assert [step["status"] for step in steps[:-1]] == ["ok"] * (len(steps) - 1)
        assert steps[-1]["status"].startswith(status)
        assert f"{status.capitalize()}" in files["report.md"]
        rest = (DECISIVE + THOROUGH)[len(steps) :]
        assert f"Not reached: {', '.join(rest)}." in files["report.md"]
        assert f"| {second}.0 |" in files["report.md"]


def test_rows_are_kept_whole_until_the_last(tmp_path):
    def rows():
        for i in range(3):
            yield {"i": i, "us": 1234.5678, "error": 1.23456e-9}
            seen.append(json.loads((tmp_path / "rows").read_text()))
        raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        record(rows(), tmp_path / "rows")
    assert [len(kept) for kept in seen] == [1, 2, 3]
    assert seen[2][2] == {"i": 2, "us": 1234.57, "error": 1.23e-9}
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


SLOW = """
import json, os, sys, time
sys.path.insert(0, {kit!r})
import kit, plan
plan.steps = lambda *_: [plan.Step("slow", 60, [sys.executable, "-c", {code!r}]), plan.Step("next", 5, ["true"])]
sys.argv[1:] = [{out!r}]
kit.main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, "cut off with the run"), (signal.SIGKILL, "running")])
def test_a_killed_kit_leaves_the_rows_of_the_step_it_was_in(number, status, tmp_path):
    out, child = tmp_path / "out", tmp_path / "child"
    code = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); "
    code += "open('RESULT', 'w').write('[{\"K\": 2}]'); time.sleep(60)"
    deadline = time.monotonic() + 30
    with subprocess.Popen([sys.executable, "-c", SLOW.format(kit=str(KIT), code=code, out=str(out))]) as process:
        try:
            while not (out / "report.md").exists() or "| 2 |" not in (out / "report.md").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.send_signal(number)
    (step,) = json.loads((out / "results.json").read_text())["steps"]
    assert (step["status"], step["result"]) == (status, [{"K": 2}])
    assert "Not reached: next." in (out / "report.md").read_text()
    pid = int(child.read_text())
    if number == signal.SIGTERM:
        while running(pid):
            assert time.monotonic() < deadline
    else:
        os.kill(pid, signal.SIGKILL)


def python(name: str, code: str, seconds: float = 20) -> plan.Step:
    return plan.Step(name, seconds, [sys.executable, "-c", code])


def test_a_step_that_fails_or_is_late_is_recorded_and_the_rest_still_run(tmp_path):
    steps = [
        python("fails", "print('because'); raise SystemExit(3)"),
        python("late", "import time; print('begun', flush=True); time.sleep(60)", seconds=3),
        plan.Step("missing", 5, ["no-such-program"]),
        python("rows", "open('RESULT', 'w').write('[{\"K\": 2, \"us\": 1.5}]')"),
        python("garbage", "open('RESULT', 'w').write('[{\"K\"')"),
    ]
    outcomes = {outcome.name: outcome for outcome in kit.run_all(steps, tmp_path)}
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


@pytest.mark.parametrize("bad", plan.names())
def test_any_step_may_fail_alone(bad, tmp_path):
    steps = [plan.Step(name, 20, ["false" if name == bad else "true"]) for name in plan.names()]
    outcomes = kit.run_all(steps, tmp_path)
    assert {outcome.name: outcome.status for outcome in outcomes} == {
        step.name: "failed (1)" if step.name == bad else "ok" for step in steps
    }
    assert [step["name"] for step in json.loads((tmp_path / "results.json").read_text())["steps"]] == [
        step.name for step in steps
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
    (outcome,) = kit.run_all([plan.Step("tests", 6, command)], tmp_path / "out")
    assert outcome.status == "late (cut off after 6 s)"
    assert outcome.result["passed"] == 1
    deadline = time.monotonic() + 10
    while running(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline


def test_no_step_begins_without_time(tmp_path):
    first, second = kit.run_all([python("first", ""), python("second", "")], tmp_path, budget=5.01)
    assert first.status == "ok"
    assert second.status == "skipped (no time left)"


def test_a_step_that_has_ended_is_written_before_the_next_begins(tmp_path):
    seen = f"import json; print([s['status'] for s in json.load(open({str(tmp_path / 'results.json')!r}))['steps']])"
    outcomes = kit.run_all([python("first", ""), python("second", seen)], tmp_path)
    assert outcomes[1].output.strip() == "['ok', 'running']"


def test_pytest_is_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-c", "/dev/null", *RECORDED]
    (outcome,) = kit.run_all([plan.Step("tests", 60, command)], tmp_path / "out")
    assert outcome.status == "failed (1)"
    assert (outcome.result["passed"], outcome.result["failed"], outcome.result["skipped"]) == (1, 1, 1)
    assert "assert 1 == 2" in outcome.result["failures"][0]["why"]
    assert "1 passed, 1 failed, 1 skipped." in (tmp_path / "out" / "report.md").read_text()


def test_arguments(tmp_path):
    for words, message in {
        (): "the following arguments are required: out",
        (str(tmp_path), "--only", "smok"): "invalid choice: 'smok'",
    }.items():
        run = subprocess.run([sys.executable, KIT / "kit.py", *words], capture_output=True, text=True)
        assert run.returncode == 2
        assert message in run.stderr


def test_a_dry_run(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", KIT / "run.sh", tmp_path / "out", "--dry", "--only", "device", "bandwidth", "capture"]
    run = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    report = (tmp_path / "out" / "report.md").read_text()
    assert "3 of 3 steps ended well: device, bandwidth, capture." in report
    assert "none: a dry run" in report
    assert "| surgery | yes |" in report


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


def test_roofline_beside_a_run():
    sys.path.insert(0, str(KIT.parent))
    import roofline

    rows = roofline.table("H100")
    eight = next(row for row in rows if (row["op"], row["K"], row["dtype"]) == ("gram", 8, "float32"))
    assert eight["kernel"] == "gram_kernel<float, 8, float>"
    assert eight["us memory"] == round(8 * 25e6 * 4 / (3350e9 * 0.9) * 1e6)
    measured = {"op": "gram", "K": 8, "dtype": "float32", "layout": "scattered", "P": 25_000_000, "us median": 300.0}
    resnet = {"op": "PCGrad", "K": 4, "dtype": "bfloat16", "model": "ResNet-50", "P": 23_508_032, "us median": 150.0}
    first, many = {**measured, "us median": 310.0}, {**measured, "layout": "3000 tensors", "us median": 900.0}
    results = {"sizes": [first], "ops": [measured, many], "models": [resnet]}
    steps = [{"name": name, "result": result} for name, result in results.items()]
    roofline.compare(rows, {"steps": steps})
    assert eight["predicted / measured"] == round(eight["us predicted"] / 300, 2)
    assert [(row["op"], row["model"]) for row in rows if row["us measured"]] == [("gram", ""), ("PCGrad", "ResNet-50")]
    roofline.compare(rows, {"steps": steps[:1]})  # of a run that was cut off before all ops
    assert eight["predicted / measured"] == round(eight["us predicted"] / 310, 2)
    surgery = next(row for row in rows if (row["op"], row["K"], row["dtype"]) == ("PCGrad", 8, "float32"))
    assert surgery["us memory"] == pytest.approx(17 * 25e6 * 4 / (3350e9 * 0.9) * 1e6, abs=1)
    by_tensor = next(row for row in rows if (row["op"], row["K"], row["dtype"]) == ("PCGrad by tensor", 8, "float32"))
    assert by_tensor["us predicted"] == surgery["us predicted"]  # as many bytes and launches
    assert roofline.markdown(rows).count("\n") == len(rows) + 1


def test_workloads_take_turns_until_they_have_left_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    assert timed.copies_beyond_cache(GPU, 100 << 20) == 3
    assert timed.copies_beyond_cache(GPU, 1 << 30) == 1
    order = []
    turn = timed.rotating([lambda name=name: order.append(name) for name in "abc"])
    for _ in range(5):
        turn()
    assert "".join(order) == "abcab"


def test_the_page_lists_the_steps_and_their_limits():
    page = (KIT / "README.md").read_text()
    for step in (*plan.decisive(), *plan.thorough(), *plan.on_request()):
        assert re.search(rf"^\| ({step.name}|.*\b{step.name}\b[^|]*) \| {step.seconds} \|", page, re.MULTILINE), (
            step.name
        )
