"""The snippets of docs/recipes.md run, and do what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the checkout")
SNIPPETS = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)) if PAGE.exists() else {}


def run(name: str) -> dict[str, Any]:
    """What a snippet leaves behind, run after the setup."""
    left: dict[str, Any] = {}
    for snippet in ("setup", name):
        exec(compile(SNIPPETS[snippet], f"{PAGE.name}: {snippet}", "exec"), left)
    return left


def test_every_snippet_is_tested():
    names = re.findall(r"```python(.*)", PAGE.read_text())
    assert [name.strip() for name in names] == list(SNIPPETS)
    assert {"setup", *TRAINS, "checkpoint", "ranks"} == set(SNIPPETS)


TRAINS = ["accumulation", "scaler", "absent", "weighting", "tensorboard"]


@pytest.mark.parametrize("name", TRAINS)
def test_it_trains(name):
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    left: dict[str, Any] = {}
    exec(compile(SNIPPETS["setup"], "setup", "exec"), left)
    before = sum(left["losses_of"](left["data"])).item()
    exec(compile(SNIPPETS[name], f"{PAGE.name}: {name}", "exec"), left)
    assert sum(left["losses_of"](left["data"])).item() < before


def test_accumulated_steps_are_about_as_long_as_one_large_batchs():
    left = run("accumulation")
    accumulated = left["trunk"][0].weight.grad.norm()
    left["optimizer"].zero_grad()
    left["mtlfast"].backward(left["losses_of"](left["data"]), left["NashMTL"](), shared=left["trunk"])
    assert 0.5 < accumulated / left["trunk"][0].weight.grad.norm() < 1.5


def test_a_checkpoint_goes_on():
    left = run("checkpoint")
    gram = torch.eye(6, dtype=torch.float64) - 0.1
    assert torch.equal(left["aggregator"].weights(gram), left["again"].weights(gram))


def rank(number: int, ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=ranks)
    left = run("ranks")
    aggregator = left["PCGrad"](order="fixed")
    torch.manual_seed(number)  # each rank has data of its own
    for _ in range(3):
        left["step"](aggregator)
    mine = torch.cat([p.detach().flatten() for p in [*left["trunk"].parameters(), *left["heads"].parameters()]])
    both = [torch.empty_like(mine) for _ in range(ranks)]
    distributed.all_gather(both, mine)
    assert torch.equal(*both)
    distributed.barrier()  # a rank that leaves first breaks the other's connection
    distributed.destroy_process_group()


def test_replicas_stay_equal(tmp_path):
    mp.spawn(rank, args=(2, str(tmp_path / "rendezvous")), nprocs=2)
