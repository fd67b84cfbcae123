"""The command line. It needs torch alone, but for the tables of `bench`."""

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import mtlfast
from mtlfast import _methods, _native, _terminal
from mtlfast._gpu import version_of
from mtlfast.compat import torchjd


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        arguments: the words after `python -m mtlfast`; None: those of this process.
    """
    parser = argparse.ArgumentParser("python -m mtlfast", description="Gradient surgery for multi-task learning.")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")
    for run in (info, methods, bench):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
    command.add_argument("--quick", action="store_true", help="each op and a PCGrad step alone, in about a minute")
    command.add_argument("--json", action="store_true", help="print one JSON object in place of tables")
    command.add_argument("--elements", type=_count, help="P, the elements of one task's gradient (25M, --quick: 5M)")
    command.add_argument("--rounds", type=_count, help="how often each time is taken, for a median (7, --quick: 3)")
    options = parser.parse_args(arguments)
    options.run(options)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return int(text)


def info(_: argparse.Namespace) -> None:
    """What was built, and whether the compiled kernels are in use or why not."""
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
    for name, value in rows.items():
        print(_terminal.hanging(f"{name:<15}  ", str(value)))


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


def methods(_: argparse.Namespace) -> None:
    """Every aggregator and loss weighting, with its paper, its state and how often it reads the gradients."""
    print(_methods.listing())


def bench(options: argparse.Namespace) -> None:
    """How fast mtlfast is on this machine, beside its memory, plain PyTorch and TorchJD where that is installed."""
    if not options.json and importlib.util.find_spec("rich") is None:
        sys.exit("bench prints its tables with rich: type `pip install 'mtlfast[cli]'`, or ask for --json")
    from mtlfast.bench.run import run_bench

    run_bench(
        elements=options.elements or (5_000_000 if options.quick else 25_000_000),
        rounds=options.rounds or (3 if options.quick else 7),
        quick=options.quick,
        as_json=options.json,
    )
