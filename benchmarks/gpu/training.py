"""A training step that never waits for the GPU, and the surgery as a CUDA graph, with and without a warm-up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timed import Row, Run, copy_bandwidth, microseconds, spread
from torch import Tensor, nn
from workloads import Setting

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import PCGrad, Step

TASKS = 8  # of the surgery


@contextmanager
def waiting_is_an_error(setting: Setting) -> Iterator[None]:
    """torch's own calls that wait for the GPU raise."""
    if setting.device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(setting: Setting, run: Callable[[], Any]) -> tuple[Run, Any]:
    """A CUDA graph's replay, and what `run` returned in the capture, which a replay rewrites.

    Without a GPU the replay is another call, copied there.
    """
    if setting.device != "cuda":
        result = run()
        return lambda: [x.copy_(y) for x, y in zip(listed(result), listed(run()), strict=True)], result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def surgery_on(grads: TaskGradients) -> Callable[[], list[Tensor]]:
    """PCGrad in a fixed order, into the same tensors each time."""
    aggregator = PCGrad(order="fixed").to(grads.device)
    out = [None if x is None else torch.empty_like(x) for x in grads.examples()]

    def run() -> list[Tensor]:
        aggregator.aggregate(grads, Step(grads.num_tasks), out)
        return [x for x in out if x is not None]

    return run


def replays_like_eager(replay: Run, run: Callable[[], Any], result: Any) -> str:
    """'yes' if a replay leaves in `result`, bit for bit, what a call returns."""
    for x in listed(result):
        x.fill_(torch.nan)
    replay()
    replayed = [x.clone() for x in listed(result)]
    same = all(torch.equal(a, b) for a, b in zip(replayed, listed(run()), strict=True))
    return "yes" if same else "no"


def listed(result: Any) -> list[Tensor]:
    """One tensor, or several."""
    return [result] if isinstance(result, Tensor) else list(result)


def step(setting: Setting) -> Iterator[Row]:
    """A training step without a host sync; the surgery alone, eager and as a replayed graph, beside its floor."""
    width = setting.width
    trunk = nn.Sequential(*[nn.Linear(width, width) for _ in range(8)]).to(setting.device)
    heads = [nn.Linear(width, 1).to(setting.device) for _ in range(4)]
    x, aggregator = torch.randn(64, width, device=setting.device), PCGrad()

    def losses() -> list[Tensor]:
        features = trunk(x)
        return [head(features).square().mean() for head in heads]

    def train() -> None:
        mtlfast.backward(losses(), aggregator, shared=trunk.parameters())

    def train_plainly() -> None:
        torch.stack(losses()).sum().backward()

    train()
    with waiting_is_an_error(setting):
        train()
    yield {"what": "a training step waits for the GPU", "found": "no"}  # it would have raised
    grads = spread(setting, TASKS, setting.elements, torch.float32)
    run = surgery_on(grads)
    run()
    replay, result = captured(setting, run)
    same = replays_like_eager(replay, run, result)
    yield {"what": "a replayed surgery equals an eager one", "found": same}
    floor = (2 * TASKS + 1) * setting.elements * 4 / copy_bandwidth(setting) / 1000
    ways: dict[str, Run] = {"training step, PCGrad": train, "training step, summed losses": train_plainly}
    ways |= {f"surgery, K = {TASKS}": run, "surgery, replayed": replay}
    for name, values in microseconds(setting, ways).items():
        row: Row = {"what": name, **{f"us {key}": value for key, value in values.items()}}
        yield {**row, "times the floor": values["median"] / floor} if name.startswith("surgery") else row
    if same != "yes":
        raise AssertionError("a replayed surgery differs from an eager one")


def capture_cold(setting: Setting) -> Iterator[Row]:
    """Captures of ops that this process has never run, so that no kernel is loaded: each alone, then a surgery."""
    grads = spread(setting, TASKS, setting.elements, torch.float32)
    weights = torch.ones(TASKS, device=setting.device)
    gram = torch.eye(TASKS, dtype=torch.float64, device=setting.device) + 0.5
    ways: dict[str, Callable[[], Any]] = {
        "gram": lambda: ops.gram(grads),
        "solve": lambda: ops.solve(gram, "pcgrad", [0.0, 0.0]),
        "combine": lambda: ops.combine(grads, weights),
        "surgery": surgery_on(grads),
    }
    failed = []
    for name, run in ways.items():
        try:
            replay, result = captured(setting, run)
            found = replays_like_eager(replay, run, result)
        except Exception as error:  # the others may still be captured
            found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if found != "yes":
            failed.append(f"{name}: {found}")
        yield {"captured without a warm-up": name, "replay equals eager": found}
    if failed:
        raise AssertionError("; ".join(failed))
