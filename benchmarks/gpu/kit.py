"""Runs the steps of the GPU kit, each in a process with a time limit of its own.

OUT/results.json and OUT/report.md are written anew after every step, so that a run that is cut off leaves what it had.
A step that fails or is late is recorded, and the rest still run.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from report import render

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
BUDGET = 520  # seconds for all steps: the kit is to end within nine minutes
TAIL = 6000  # characters of a step's output that are kept


@dataclass
class Step:
    """A command, and how many seconds it may take. RESULT in it is where it writes its JSON, if it does."""

    name: str
    seconds: float
    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """The result of a step."""

    name: str
    status: str  # ok, failed, late, skipped
    seconds: float
    output: str  # its last lines
    result: Any = None


def measure(name: str, seconds: float) -> Step:
    """A step that runs one measurement of measure.py."""
    return Step(name, seconds, [sys.executable, str(HERE / "measure.py"), name, "RESULT"])


def sanitizer(tool: str, seconds: float) -> Step:
    """A step that runs compute-sanitizer over a small set of tests."""
    tests = [
        "tests/test_gram.py",
        "tests/test_combine.py",
        "tests/test_solve.py",
        "-m",
        "cuda",
        "-k",
        "mixed or project",
    ]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *tests]
    return Step(tool, seconds, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def steps() -> list[Step]:
    """All steps, the most valuable first."""
    pytest = [sys.executable, "-m", "pytest", "tests", "-m", "cuda", "--tb=short"]
    pytest += ["-p", "outcomes", "--outcomes", "RESULT"]
    pytest += ["--continue-on-collection-errors"]  # a test file may want a package that this machine lacks
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", "4"]
    return [
        measure("device", 30),
        Step("build", 240, [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], {"MTLFAST_CUDA": "1"}),
        Step("tests", 180, pytest, {"MTLFAST_GRID": "all"}),
        measure("bandwidth", 20),
        measure("ops", 90),
        measure("step", 30),
        measure("solvers", 20),
        measure("peers", 50),
        measure("models", 40),
        sanitizer("memcheck", 50),
        sanitizer("racecheck", 50),
        sanitizer("initcheck", 50),
        measure("compiled", 60),
    ]


def finish(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Waits; kills it and its children if it is late, and returns False."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def run_step(step: Step, seconds: float, folder: Path) -> Outcome:
    """Runs one step. Whatever happens in it becomes an Outcome."""
    result, start = folder / f"{step.name}.result", time.monotonic()
    command = [part.replace("RESULT", str(result)) for part in step.command]
    env = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{HERE}", "MTLFAST_REQUIRE_NATIVE": "1", **step.env}
    log = folder / f"{step.name}.output"
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=CHECKOUT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            status = f"failed ({error})"
        else:
            in_time = finish(process, seconds)
            ended = "ok" if process.returncode == 0 else f"failed ({process.returncode})"
            status = ended if in_time else f"late (cut off after {seconds:.0f} s)"
    text = log.read_text(errors="replace")
    return Outcome(step.name, status, round(time.monotonic() - start, 1), text[-TAIL:], read_result(result))


def read_result(path: Path) -> Any:
    """The JSON that the step wrote, or None."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(out: Path, outcomes: list[Outcome]) -> None:
    """Writes both files, each completely or not at all."""
    results = {"steps": [asdict(outcome) for outcome in outcomes]}
    for name, text in {"results.json": json.dumps(results, indent=1) + "\n", "report.md": render(results)}.items():
        (out / f".{name}").write_text(text)
        (out / f".{name}").replace(out / name)


def run_all(plan: list[Step], out: Path, budget: float = BUDGET) -> list[Outcome]:
    """Runs the plan within `budget` seconds."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for step in plan:
            left = budget - (time.monotonic() - start)
            if left < 5:
                outcomes.append(Outcome(step.name, "skipped (no time left)", 0.0, ""))
            else:
                outcomes.append(run_step(step, min(step.seconds, left), Path(folder)))
            print(f"{step.name}: {outcomes[-1].status}, {outcomes[-1].seconds} s", flush=True)
            write(out, outcomes)
    return outcomes


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for report.md and results.json")
    parser.add_argument("--only", nargs="*", help="names of the steps to run; default: all")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps")
    arguments = parser.parse_args()
    plan = [step for step in steps() if not arguments.only or step.name in arguments.only]
    outcomes = run_all(plan, arguments.out, arguments.budget)
    sys.exit(0 if all(outcome.status == "ok" for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
