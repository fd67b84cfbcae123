"""Times one whole training step of K tasks: the table of the main README.

    python benchmarks/readme_table.py            # prints the table
    python benchmarks/readme_table.py --write    # and puts it into README.md

A step is the forward pass, the backward passes, PCGrad and an SGD step, of a transformer with K heads. The loop by hand
is the block `by_hand` of README.md itself. TorchJD has its fastest settings: `optimize_gramian_computation=True`, and
the faster of all backward passes at once and one after another. (At once, parts of a transformer run slowly on a CPU.)
"""

import argparse
import platform
import re
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torchjd
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import PCGrad
from mtlfast.bench.peers import torchjd_backward
from mtlfast.bench.timing import Timing, take_turns

README = Path(__file__).parents[1] / "README.md"
BY_HAND = re.compile(r"^```python by_hand\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"(<!-- readme_table: begin -->\n).*?(<!-- readme_table: end -->)", re.DOTALL)
BATCHED = "TorchJD, all passes at once"
TASKS, WIDTH, LAYERS, BATCH, LENGTH = (2, 4, 8), 512, 4, 8, 32


class Trunk(nn.Module):
    """A transformer encoder; the features are the mean over the sequence."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, nhead=8, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, width]."""
        return self.encoder(x).mean(dim=1)


def ways_to_step(
    num_tasks: int, width: int = WIDTH, layers: int = LAYERS
) -> tuple[dict[str, Callable[[], None]], nn.Module]:
    """The ways to make a step with `num_tasks` tasks, each on the same model, by name; and the model."""
    torch.manual_seed(0)
    trunk, heads = Trunk(width, layers), nn.ModuleList(nn.Linear(width, 10) for _ in range(num_tasks))
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=1e-4)
    x, targets = torch.randn(BATCH, LENGTH, width), torch.randn(num_tasks, BATCH, 10)
    by_hand = compile(BY_HAND.findall(README.read_text())[0], "README.md: by_hand", "exec")
    ours, theirs = PCGrad(), torchjd.aggregation.PCGrad()

    def forward() -> tuple[Tensor, list[Tensor]]:
        optimizer.zero_grad()
        features = trunk(x)
        return features, [(head(features) - y).square().mean() for head, y in zip(heads, targets, strict=True)]

    def step_of_mtlfast() -> None:
        _, losses = forward()
        mtlfast.backward(losses, ours, shared=trunk)
        optimizer.step()

    def step_of_torchjd(at_once: int | None) -> None:
        features, losses = forward()
        torchjd_backward(losses, features, trunk.parameters(), theirs, optimize=True, at_once=at_once)
        optimizer.step()

    def step_by_hand() -> None:
        _, losses = forward()
        exec(by_hand, {"torch": torch, "trunk": trunk, "heads": heads, "losses": losses})
        optimizer.step()

    def step_without_surgery() -> None:
        _, losses = forward()
        torch.stack(losses).sum().backward()
        optimizer.step()

    ways = {
        "mtlfast": step_of_mtlfast,
        "TorchJD": partial(step_of_torchjd, at_once=1),
        BATCHED: partial(step_of_torchjd, at_once=None),
        "by hand": step_by_hand,
        "no surgery": step_without_surgery,
    }
    return ways, nn.ModuleList([trunk, heads])


def processor() -> str:
    """The name that the processor gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit that is checked out."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=README.parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def table(times: dict[int, dict[str, Timing]], rounds: int) -> str:
    """The table in Markdown, and below it what was measured where."""
    ways = [way for way in next(iter(times.values())) if way != BATCHED]
    lines = ["| K |" + "".join(f" {way} |" for way in ways), "|--:|" + "--:|" * len(ways)]
    for num_tasks, of_ways in times.items():
        seconds = {way: of_ways[way].median for way in ways}
        seconds["TorchJD"] = min(seconds["TorchJD"], of_ways[BATCHED].median)
        lines.append(f"| {num_tasks} |" + "".join(f" {seconds[way] * 1e3:.0f} |" for way in ways))
    lines += [
        "",
        f"Medians of {rounds} steps, taken in turn in one run: {processor()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, TorchJD {version('torchjd')} with its fastest settings, "
        f"commit {commit()}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Times, prints and, if asked, writes."""
    parser = argparse.ArgumentParser(description="Times whole training steps for the table of README.md.")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each way")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    times = {K: take_turns(ways_to_step(K)[0], arguments.rounds, warmups=2) for K in TASKS}
    written = table(times, arguments.rounds)
    print(written)
    if arguments.write:
        text, found = PLACE.subn(lambda place: f"{place[1]}{written}{place[2]}", README.read_text())
        if found != 1:
            raise SystemExit(f"README.md has {found} places for the table, expected 1")
        README.write_text(text)


if __name__ == "__main__":
    main()
