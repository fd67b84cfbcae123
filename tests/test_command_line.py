"""`python -m mtlfast`, and that the package needs nothing beside torch."""

import json
import os
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import torch

from mtlfast import aggregation, weighting
from mtlfast._cli import main
from mtlfast.bench.contests import PASSES

CHECKOUT = Path(__file__).parents[1]
# What a development environment has, and torch does not need.
EXTRAS = ("rich", "typer", "numpy", "matplotlib", "tensorboard", "wandb")
TORCH_ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # each raises ModuleNotFoundError when it is imported
"""
TRAIN = """
import torch, mtlfast
net = torch.nn.Linear(3, 2)
monitor = mtlfast.monitor.ConflictMonitor()
monitor.update(mtlfast.backward(
    list(net(torch.ones(4, 3)).square().mean(0)),
    mtlfast.aggregation.PCGrad(),
    shared=net,
    weighting=mtlfast.weighting.DWA(2),
))
assert monitor.report().startswith("2 tasks over 1 step.")
assert net.weight.grad.isfinite().all()
print("trained")
"""


def beside_torch_alone(code: str) -> subprocess.CompletedProcess:
    """Runs `code` in a Python that finds none of `EXTRAS`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", TORCH_ALONE + code], env=env, capture_output=True, text=True)


def command(*words: str) -> str:
    return f"from mtlfast._cli import main; main({words})\n"


def test_torch_alone_imports_trains_and_informs():
    ran = beside_torch_alone(TRAIN + command("info") + command("methods"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("trained\nmtlfast  ")
    assert "\npython, torch  " in ran.stdout
    assert "\n  PCGrad  " in ran.stdout


def test_bench_asks_in_one_line_for_the_extra_that_it_needs():
    ran = beside_torch_alone(command("bench", "--quick"))
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert ran.stderr.splitlines()[-1] == (
        "bench prints its tables with rich: type `pip install 'mtlfast[cli]'`, or ask for --json"
    )


def test_bench_prints_rows_as_json_beside_torch_alone():
    ran = beside_torch_alone(command("bench", "--quick", "--json", "--elements", "100000", "--rounds", "1"))
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)["ops"]["rows"]
    assert {row["op"] for row in rows} >= {*PASSES}
    assert {(row["K"], row["dtype"]) for row in rows} >= {(8, "float32"), (8, "bfloat16")}
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="needs the checkout")
@pytest.mark.parametrize("native", ["0", "1"])
def test_the_package_requires_torch_alone(tmp_path, native):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path],
        cwd=CHECKOUT,
        env={**os.environ, "MTLFAST_NATIVE": native},
        check=True,
    )
    required = Distribution.at(tmp_path / "mtlfast.egg-info").requires
    always = [line for line in required if "extra ==" not in line]
    minor = ".".join(torch.__version__.split(".")[:2])
    assert always == ["torch>=2.11" if native == "0" else f"torch=={minor}.*"]
    assert [line.split(";")[0] for line in required if 'extra == "cli"' in line] == ["rich>=13"]


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_methods_are_listed_within_the_terminals_width(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["methods"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    words = " ".join(printed.split())
    for families in (aggregation.FAMILIES, weighting.FAMILIES):
        for family, methods in families.items():
            assert f"\n{family}\n" in printed
            for method, summary in methods.items():
                assert f" {method.__name__} {summary} {method.paper}".rstrip() in words


def test_methods_are_listed_with_their_state_and_reads(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["methods"])
    entries = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    aggregators = sum(map(len, aggregation.FAMILIES.values()))
    assert len(entries) == aggregators + sum(map(len, weighting.FAMILIES.values()))
    ends = {name: " ".join(words) for name, *words in entries[:aggregators]}
    assert ends["NashMTL"].endswith("; keeps n weights; 2 reads")
    assert ends["ClipNorm"].endswith("2 reads, one for the norms alone")
    assert ends["Sum"].endswith(" 1 read")
    assert ends["Compose"].endswith("keeps its methods' state; its methods' reads")
    by_norms = {method.__name__ for method in weighting.FAMILIES["by gradient norms"]}
    assert {name for name, *words in entries[aggregators:] if "read" in words} == by_norms


def test_without_a_command_it_says_which_there_are(capsys):
    main([])
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in ("info", "methods", "bench"))


def test_bench_refuses_counts_below_one(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--rounds", "0"])
    assert "--rounds: expected an integer of at least 1, got 0" in capsys.readouterr().err
