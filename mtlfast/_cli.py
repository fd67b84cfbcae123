"""The command line."""

import os
import platform
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import mtlfast
from mtlfast import _native
from mtlfast._gpu import version_of
from mtlfast._methods import methods_tables
from mtlfast.bench.run import run_bench
from mtlfast.compat import torchjd

app = typer.Typer(help="Gradient surgery for multi-task learning.", no_args_is_help=True, add_completion=False)


@app.command()
def info() -> None:
    """What was built, what is in use, and why not."""
    facts, native = _native.build_facts(), _native.C
    rows = {
        "mtlfast": f"{mtlfast.__version__}, commit {facts.get('commit', 'unknown')}",
        "python, torch": f"{platform.python_version()}, {torch.__version__}",
        "in use": "compiled kernels" if native else f"plain-PyTorch reference: {_native.REASON}",
    }
    if facts:
        rows["built for torch"] = facts["torch"]
        nvcc = facts["nvcc"] and f"nvcc {facts['nvcc']} ({facts['nvcc_found']})"
        rows["built with"] = ", ".join(filter(None, [facts["compiler"], nvcc]))
    if native:
        try:
            isa = native.isa()
        except ValueError as error:
            isa = str(error)
        rows["CPU kernels"] = f"{', '.join(facts['cpu_units'])}; in use: {isa}, {torch.get_num_threads()} threads"
        rows["CUDA kernels"] = _cuda_line(facts, native.cuda_facts())
        rows.update(_unserved())
    rows["torchjd"] = torchjd.status()
    settings = {
        name: os.environ[name] for name in ("MTLFAST_REQUIRE_NATIVE", "MTLFAST_CPU_CAPABILITY") if name in os.environ
    }
    rows["environment"] = ", ".join(f"{name}={value}" for name, value in settings.items()) or "nothing set"
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", str(value))
    Console(soft_wrap=True).print(table)


def _cuda_line(facts: dict[str, Any], cuda: dict[str, Any]) -> str:
    if not cuda:
        return f"none in this build, as {facts['without_cuda']}"
    archs, kernels = facts["cuda_archs"], facts["cuda_kernels"]
    counts = sorted({len(of_arch) for of_arch in kernels.values()})
    line = f"{' or '.join(map(str, counts))} kernels for {', '.join(archs)}, {_cuda_versions(cuda)}"
    if torch.cuda.is_available():
        return f"{line}; {torch.cuda.device_count()} devices"
    if cuda["error"] or not cuda["devices"]:
        return f"{line}; no device to use ({cuda['error'] or 'no GPU'})"
    return f"{line}; {cuda['devices']} devices, but this torch has no CUDA"


def _cuda_versions(cuda: dict[str, Any]) -> str:
    driver = f"driver of CUDA {version_of(cuda['driver'])}" if cuda["driver"] else "no driver"
    return f"runtime of CUDA {version_of(cuda['runtime'])}, {driver}"


def _unserved() -> dict[str, str]:
    """A row for each GPU that the reference serves: why."""
    reasons = {f"on cuda:{i}": _native.why_not(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
    return {gpu: f"plain-PyTorch reference: {reason}" for gpu, reason in reasons.items() if reason}


@app.command()
def methods() -> None:
    """Every balancing method: its kind, paper, state, and cost in passes over the K * P elements of the gradients."""
    console = Console()
    Console(width=None if console.is_terminal else 160).print(*methods_tables(), sep="\n\n")


@app.command()
def bench(
    quick: Annotated[bool, typer.Option(help="A minute's worth: ops and peers alone, 5M elements, 3 rounds.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")] = False,
    elements: Annotated[int | None, typer.Option(help="Elements of one task's gradient (P); 25M.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Alternating rounds, of which medians are shown; 7.")] = None,
) -> None:
    """The microbenchmark: each op against this machine's memory, the plain-PyTorch way and peers."""
    run_bench(
        elements=elements or (5_000_000 if quick else 25_000_000),
        rounds=rounds or (3 if quick else 7),
        quick=quick,
        as_json=json,
    )
