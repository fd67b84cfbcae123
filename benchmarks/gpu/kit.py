"""Runs the steps of the GPU kit, each in a process with a time limit of its own.

OUT/results.json and OUT/report.md are written anew when a step begins and ends, and every second in between: a run that
is cut off, however suddenly, leaves what it had. A step that fails or is late is recorded, and the rest still run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plan
from plan import HERE, Step
from records import write_whole
from report import render

CHECKOUT = HERE.parents[1]
BUDGET = 520  # seconds for all steps: the kit is to end within nine minutes
LEAST = 5  # seconds: with less a step does not begin
LOOK = 1.0  # seconds between two looks at what a running step has written
TAIL = 6000  # characters of a step's output that are kept


@dataclass
class Outcome:
    """What became of a step, or what it has so far."""

    name: str
    status: str  # running, ok, failed, late, skipped, cut off
    seconds: float
    output: str = ""  # its last characters
    result: Any = None


Seen = Callable[[Outcome], None]


def read_result(path: Path) -> Any:
    """The JSON that the step wrote, if it did."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def ends(process: "subprocess.Popen[bytes]", seconds: float, look: Callable[[], None]) -> bool:
    """Waits so long, and looks now and then; False if the process is still running."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            process.wait(min(LOOK, left))
            return True
        except subprocess.TimeoutExpired:
            look()
    return False


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends it and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_step(step: Step, seconds: float, folder: Path, seen: Seen) -> Outcome:
    """Runs one step, telling `seen` what it has so far; whatever happens in it becomes an Outcome."""
    result, log, start = folder / f"{step.name}.result", folder / f"{step.name}.output", time.monotonic()
    command = [part.replace("RESULT", str(result)) for part in step.command]
    env = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{HERE}", "MTLFAST_REQUIRE_NATIVE": "1", **step.env}

    def outcome(status: str) -> Outcome:
        text = log.read_text(errors="replace")[-TAIL:]
        return Outcome(step.name, status, round(time.monotonic() - start, 1), text, read_result(result))

    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=CHECKOUT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return outcome(f"failed ({error})")
        try:
            in_time = ends(process, seconds, lambda: seen(outcome("running")))
        finally:
            end(process)
    if not in_time:
        return outcome(f"late (cut off after {seconds:.0f} s)")
    return outcome("ok" if process.returncode == 0 else f"failed ({process.returncode})")


def run_all(
    steps: Sequence[Step],
    out: Path,
    budget: float = BUDGET,
    run: Callable[[Step, float, Path, Seen], Outcome] = run_step,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Runs the steps within `budget` seconds.

    Args:
        steps: in their order.
        out: folder of results.json and report.md.
        budget: seconds by the clock.
        run: what runs one step.
        clock: seconds since some time.
    """
    out.mkdir(parents=True, exist_ok=True)
    done: list[Outcome] = []
    start = clock()

    def keep(current: Outcome) -> None:
        results = {"plan": [step.name for step in steps], "steps": [asdict(o) for o in (*done, current)]}
        write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
        write_whole(out / "report.md", render(results))

    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            left = budget - (clock() - start)
            latest = Outcome(step.name, "running", 0.0)

            def seen(current: Outcome) -> None:
                nonlocal latest
                latest = current
                keep(latest)

            if left < LEAST:
                latest = Outcome(step.name, "skipped (no time left)", 0.0)
            else:
                keep(latest)
                try:
                    latest = run(step, min(step.seconds, left), Path(folder), seen)
                except BaseException:
                    latest.status = "cut off with the run"
                    keep(latest)
                    raise
            keep(latest)
            done.append(latest)
            print(f"{step.name}: {latest.status}, {latest.seconds} s", flush=True)
    return done


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for report.md and results.json")
    parser.add_argument("--only", nargs="+", choices=plan.names(), metavar="STEP", help="the steps to run")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps")
    parser.add_argument("--dry", action="store_true", help="on the CPU, on little data: does the kit itself work?")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the running step ends too
    outcomes = run_all(plan.steps(arguments.only or (), arguments.dry), arguments.out, arguments.budget)
    sys.exit(0 if all(outcome.status == "ok" for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
