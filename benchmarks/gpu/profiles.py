"""One profile each of the staged Gram matrix and of UPGrad's solver: torch's profiler, then Nsight Compute's counters.

Nsight Compute runs this file as a program of its own.
"""

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from timed import Row, Run, spread
from torch.profiler import ProfilerActivity, profile
from workloads import GPU, Setting

from mtlfast import ops
from mtlfast.aggregation import Step, UPGrad

STAGED, SOLVED = 32, 40  # tasks
ABOUT = {"grid": "grid", "block": "block", "registers per thread": "registers", "shared memory": "shared bytes"}
ABOUT["est. achieved occupancy %"] = "occupancy %"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")


def profiled(setting: Setting) -> dict[str, Run]:
    """What is profiled, ready to run."""
    grads = spread(setting, STAGED, setting.elements, torch.float32)
    J = torch.randn(SOLVED, 2 * SOLVED, dtype=torch.float64, device=setting.device)
    arguments = UPGrad().solve_arguments(J @ J.T, Step(SOLVED))
    return {f"gram, K = {STAGED}": partial(ops.gram, grads), f"UPGrad, K = {SOLVED}": partial(ops.solve, *arguments)}


def profiles(setting: Setting) -> Iterator[Row]:
    """A row for each kernel (without a GPU each of torch's ops), then one for each of Nsight Compute's counters."""
    for name, run in profiled(setting).items():
        run()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        activity = ProfilerActivity.CUDA if setting.device == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            run()
            if setting.device == "cuda":
                torch.cuda.synchronize()
        yield from kernels(name, profiler, "kernel" if setting.device == "cuda" else "cpu_op")
    if setting.device == "cuda" and shutil.which("ncu"):
        yield from counters()


def kernels(name: str, profiler: profile, category: str) -> Iterator[Row]:
    """Each of the profiler's events of this category."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    for event in events:
        if event.get("cat") == category:
            about = {label: str(event["args"][key]) for key, label in ABOUT.items() if key in event.get("args", {})}
            yield {"of": name, "kernel": event["name"].split("(")[0], "us": event["dur"], **about}


def counters() -> Iterator[Row]:
    """What Nsight Compute counts in each launch of the two kernels."""
    command = ["ncu", "--csv", "--page", "details", "--clock-control", "none"]
    command += ["--kernel-name", "regex:gram_staged|solve_kernel"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    run = subprocess.run([*command, sys.executable, __file__], capture_output=True, text=True)
    table = [line for line in run.stdout.splitlines() if line.startswith('"')]  # it also says what it does
    if not table:
        yield {"of": "ncu", "kernel": f"none: {(run.stdout + run.stderr).strip()[-300:]}"}
    for row in csv.DictReader(table):
        if row.get("Metric Name"):
            kernel = row["Kernel Name"].split("(")[0]
            yield {"of": "ncu", "kernel": kernel, "counter": row["Metric Name"], "value": of_unit(row)}


def of_unit(row: dict[str, str]) -> str:
    """A counter's value and unit."""
    return f"{row['Metric Value']} {row['Metric Unit']}".strip()


if __name__ == "__main__":
    for run in profiled(GPU).values():
        run()
    torch.cuda.synchronize()
