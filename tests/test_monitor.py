"""`ConflictMonitor`'s numbers: gradients with known answers, a plain twin on random steps, and what an update costs."""

import copy
import dataclasses
import math
import random
import statistics
from collections import Counter

import pytest
import torch
from monitored import fed, step_of
from torch.utils._python_dispatch import TorchDispatchMode

import mtlfast
from mtlfast.aggregation import GradDrop, PCGrad, Sum
from mtlfast.monitor import ConflictMonitor

ROWS = [[3.0, 4.0], [-2.0, 0.0], [0.0, 0.5]]  # cosines -0.6, 0.8 and 0; lengths 5, 2 and 0.5


def test_gradients_with_known_answers():
    monitor = fed(ConflictMonitor(window=10), 25, ROWS, losses=[1, 2, 3], weights=[1, 2, 4])
    seen = monitor.statistics()
    assert (seen.steps, seen.not_finite, monitor.steps) == (10, 0, 25)
    assert monitor.names == seen.names == ("task 0", "task 1", "task 2")
    torch.testing.assert_close(seen.cosines, torch.tensor([[1, -0.6, 0.8], [-0.6, 1, 0], [0.8, 0, 1]]).double())
    assert torch.equal(seen.conflict_rate, torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).double())
    torch.testing.assert_close(seen.norms, torch.tensor([5, 2, 0.5]).double())
    torch.testing.assert_close(seen.ratios[0], torch.tensor([1, 2.5, 10]).double())
    torch.testing.assert_close(seen.weights, torch.tensor([1, 2, 4]).double())
    torch.testing.assert_close(seen.shares, torch.tensor([5, 4, 2]).double() / 11)
    torch.testing.assert_close(seen.losses, torch.tensor([1, 2, 3]).double())
    assert seen.condition > 1e12  # three gradients of two numbers


def test_the_condition_number_is_that_of_unit_gradients():
    monitor = fed(ConflictMonitor(), 3, [[30.0, 40.0], [-2.0, 0.0]])
    assert monitor.statistics().condition == pytest.approx(1.6 / 0.4)
    fed(monitor, 4, [[1.0, 0.0], [0.0, 7.0]])
    assert monitor.statistics().condition == pytest.approx(1)


def test_the_standard_error_of_a_mean_cosine():
    monitor = ConflictMonitor()
    cosines = [-0.6, 0.0, 0.8, 1.0]
    for cosine in cosines:
        monitor.update(step_of([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]]))
    seen = monitor.statistics()
    assert seen.cosines[0, 1] == pytest.approx(statistics.mean(cosines))
    assert seen.errors[0, 1] == pytest.approx(statistics.stdev(cosines) / 2)


def test_what_mtlfast_backward_returns():
    w = torch.nn.Parameter(torch.zeros(2))
    monitor = ConflictMonitor()
    for aggregator in (PCGrad(), Sum(), GradDrop()):
        losses = {"depth": 3 * w[0] + 4 * w[1] + 1, "edges": -2 * w[0] + 5}
        result = mtlfast.backward(losses, aggregator, shared=[w], diagnostics=True)
        monitor.update(result)
    seen = monitor.statistics()
    assert monitor.names == ("depth", "edges")
    assert seen.cosines[0, 1] == pytest.approx(-0.6)
    assert seen.losses.tolist() == [1, 5]
    weights = mtlfast.backward([3 * w[0] + 4 * w[1], -2 * w[0]], PCGrad(), shared=[w]).weights
    torch.testing.assert_close(seen.weights, (weights + 1) / 2)  # GradDrop has none


def test_weights_that_are_forgotten_do_not_come_back():
    monitor = fed(ConflictMonitor(window=2), 2, ROWS, weights=[1, 2, 3])
    assert fed(monitor, 2, ROWS).statistics().weights.isnan().all()


def test_a_weighting_changes_the_gradients_and_not_the_losses():
    w = torch.nn.Parameter(torch.zeros(2))
    weighting = mtlfast.weighting.Constant([10.0, 1.0])
    monitor = ConflictMonitor()
    monitor.update(mtlfast.backward([3 * w[0] + 2, w[1] + 1], PCGrad(), shared=[w], weighting=weighting))
    assert monitor.statistics().norms.tolist() == pytest.approx([30, 1])
    assert monitor.statistics().losses.tolist() == [2, 1]


def test_absent_tasks_do_not_count_and_new_ones_join():
    monitor = fed(ConflictMonitor(window=10), 4, [[1.0, 0.0], [-1.0, 0.0]])
    fed(monitor, 3, [[1.0, 0.0], [1.0, 1.0]], tasks=[0, 2], losses=[2, 8])
    fed(monitor, 2, [[5.0, 0.0]], tasks=[1], losses=[4], weights=[0.5])
    seen = monitor.statistics()
    assert seen.steps == 9
    assert seen.together[0].tolist() == [7, 4, 3]
    assert seen.together[1].tolist() == [4, 6, 0]
    assert seen.cosines[0].tolist() == pytest.approx([1, -1, 0.5**0.5])
    assert seen.cosines[1, 2].isnan()
    assert seen.losses.tolist() == pytest.approx([(4 + 3 * 2) / 7, (4 + 2 * 4) / 6, 8])
    assert seen.weights.tolist() == pytest.approx([math.nan, 0.5, math.nan], nan_ok=True)
    assert seen.pairs() == [(0, 1), (0, 2)]


def test_a_task_that_comes_later_is_unknown_before():
    monitor = fed(ConflictMonitor(window=2), 2, [[1.0, 0.0], [-1.0, 0.0]])
    fed(monitor, 2, ROWS, losses=[1, 2, 3])
    history = monitor.state_dict()["history"]
    assert history["losses"].tolist() == [[1, 1, pytest.approx(math.nan, nan_ok=True)], [1, 2, 3]]
    assert history["cosines"].isnan()[0].tolist() == [[False, False, True], [False, False, True], [True] * 3]


def test_a_zero_gradient_has_no_cosine_and_counts_otherwise():
    monitor = fed(ConflictMonitor(), 3, [[0.0, 0.0], [2.0, 0.0]], weights=[1, 1])
    fed(monitor, 1, [[-1.0, 0.0], [2.0, 0.0]], weights=[1, 1])
    seen = monitor.statistics()
    assert (seen.steps, seen.together[0, 1].item(), seen.cosines[0, 1].item()) == (4, 1, -1)
    assert seen.shares.tolist() == pytest.approx([1 / 12, 11 / 12])
    assert seen.norms.tolist() == pytest.approx([1, 2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_steps_that_are_not_finite_are_counted_apart(where, bad):
    rows, losses = copy.deepcopy(ROWS), [1.0, 2.0, 3.0]
    if where == "gradient":
        rows[2][1] = bad
    else:
        losses[2] = bad
    clean = fed(ConflictMonitor(window=8), 5, ROWS, weights=[1, 1, 1]).statistics()
    monitor = fed(ConflictMonitor(window=8), 2, rows, losses=losses, weights=[math.nan] * 3)
    fed(monitor, 5, ROWS, weights=[1, 1, 1])
    seen = monitor.statistics()
    assert (seen.steps, seen.not_finite) == (5, 2)
    assert seen.scalars() == clean.scalars() | {"steps not finite": 2}
    assert fed(monitor, 6, ROWS, weights=[1, 1, 1]).statistics().not_finite == 0


def test_groups():
    rows = [[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]], [[0.0, 0.0], [3.0, 0.0]]]
    monitor = fed(ConflictMonitor(), 3, rows, groups=["a", "b", "c"], weights=[[1, 1], [2, 1], [3, 1]])
    assert monitor.groups == ("a", "b", "c")
    assert monitor.statistics("a").cosines[0, 1] == -1
    assert monitor.statistics("b").cosines[0, 1] == 0
    assert monitor.statistics("b").weights.tolist() == [2, 1]
    assert monitor.statistics("b").shares.tolist() == pytest.approx([4 / 6, 2 / 6])
    assert monitor.statistics("c").together[0, 1] == 0  # task 0 does not reach it
    seen = monitor.statistics()
    whole = torch.tensor(rows).transpose(0, 1).flatten(1)
    assert seen.cosines[0, 1] == pytest.approx(torch.cosine_similarity(*whole, dim=0).item())
    assert seen.norms.tolist() == pytest.approx(whole.norm(dim=1).tolist())
    assert seen.weights.tolist() == [2, 1]
    lengths = [math.hypot(1, 4), math.sqrt(1 + 4 + 9)]
    assert seen.shares.tolist() == pytest.approx([x / sum(lengths) for x in lengths])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_loss_scale_is_undone(as_tensor):
    plain, scaled = ConflictMonitor(window=50), ConflictMonitor(window=50)
    for k in range(10):
        scale = 2.0 ** (16 - k)
        plain.update(step_of(ROWS, losses=[1 + k, 2, 3], weights=[1, 2, 3]))
        result = step_of(ROWS, losses=[1 + k, 2, 3], weights=[1, 2, 3], loss_scale=scale)
        scaled.update(result, loss_scale=torch.tensor([scale]) if as_tensor else scale)
    expected = plain.statistics().scalars()
    assert scaled.statistics().scalars() == pytest.approx(expected, rel=1e-12)
    assert expected["loss/task 0"] == 5.5


def twin(steps: list[dict], n: int) -> dict:
    """The statistics of some steps, in plain Python."""
    finite = [s for s in steps if torch.isfinite(s["J"]).all() and torch.isfinite(s["losses"]).all()]
    found = {"steps": len(finite), "not_finite": len(steps) - len(finite)}
    cosines = {(i, j): [] for i in range(n) for j in range(n)}
    losses, norms, shares = ([[] for _ in range(n)] for _ in range(3))
    for s in finite:
        total = sum(w * g.norm().item() for w, g in zip(s["weights"].tolist(), s["J"], strict=True))
        for a, i in enumerate(s["tasks"]):
            losses[i].append(s["losses"][a].item())
            if total > 0:
                shares[i].append(s["weights"][a].item() * s["J"][a].norm().item() / total)
            if s["J"][a].norm() > 0:
                norms[i].append(s["J"][a].norm().log().item())
            for b, j in enumerate(s["tasks"]):
                if s["J"][a].norm() > 0 and s["J"][b].norm() > 0:
                    cosines[i, j].append(torch.cosine_similarity(s["J"][a], s["J"][b], dim=0).item())

    def mean(xs):
        return sum(xs) / len(xs) if xs else math.nan

    found["losses"], found["shares"] = [*map(mean, losses)], [*map(mean, shares)]
    found["norms"] = [math.exp(mean(xs)) for xs in norms]
    found["cosines"] = [[mean(cosines[i, j]) for j in range(n)] for i in range(n)]
    found["conflict_rate"] = [[mean([x < 0 for x in cosines[i, j]]) for j in range(n)] for i in range(n)]
    found["together"] = [[len(cosines[i, j]) for j in range(n)] for i in range(n)]
    return found


@pytest.mark.parametrize("window", [1, 7, 40])
def test_random_steps_beside_plain_python(window):
    draw, n, steps = random.Random(window), 5, []
    generator = torch.Generator().manual_seed(window)
    monitor = ConflictMonitor(window=window)
    for at in range(33):
        tasks = sorted(draw.sample(range(n), draw.randint(1, n))) if at % 3 else list(range(n))
        J = torch.randn(len(tasks), 6, dtype=torch.float64, generator=generator)
        weights = torch.rand(len(tasks), dtype=torch.float64, generator=generator)
        losses = torch.rand(len(tasks), dtype=torch.float64, generator=generator)
        if at % 5 == 1:
            J[0] = 0
        if at % 11 == 2:
            J[-1, 2] = math.inf
        if len(tasks) > 1 and at == 7:
            losses[1] = math.nan
        steps.append({"tasks": tasks, "J": J, "losses": losses, "weights": weights})
        monitor.update(step_of(J, losses=losses, weights=weights, tasks=tasks))
        seen = monitor.statistics()
        for name, expected in twin(steps[-window:], len(monitor.names)).items():
            found = getattr(seen, name)
            if isinstance(expected, list):
                expected = torch.tensor(expected, dtype=torch.float64)
                torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-6, atol=1e-9)
            else:
                assert found == expected


class Operations(TorchDispatchMode):
    """Counts what runs on tensors, without the views."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(ret.alias_info and not ret.alias_info.is_write for ret in func._schema.returns):
            self.found[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_an_update_is_four_copies():
    monitor = ConflictMonitor(window=1000)
    result = step_of(ROWS, weights=[1, 1, 1])
    monitor.update(result)
    with Operations() as operations:
        monitor.update(result)
    assert operations.found == {"copy_": 3, "fill_": 1}
    with Operations() as operations:
        monitor.update(step_of(ROWS, weights=[1, 1, 1], tasks=[0, 2, 3]))
        monitor.update(step_of(ROWS, weights=[1, 1, 1], tasks=[0, 2, 3]))
    assert not any("item" in name or "local_scalar" in name or "to_copy" in name for name in operations.found)


def test_an_update_reads_nothing_on_the_host():
    # A meta tensor has no values, so that whatever would wait for a GPU raises here.
    monitor = ConflictMonitor(window=3)
    for tasks in ((0, 1), (0, 2), (0, 1, 2), (1,)) * 3:
        K = len(tasks)
        result = mtlfast.StepResult(
            losses=torch.empty(K, device="meta"),
            tasks=tasks,
            weights=None if K == 1 else torch.empty(2, K, device="meta"),
            gram=torch.empty(2, K, K, device="meta"),
            groups=("a", "b"),
        )
        monitor.update(result, loss_scale=torch.empty((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        monitor.statistics()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_updates_and_logs_do_not_wait_for_the_gpu():
    from test_cuda import waiting_is_an_error

    w = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    monitor, written = ConflictMonitor(window=4), []
    sink = type("Sink", (), {"log": lambda self, values, step: written.append((step, values))})()

    def train() -> None:
        for k in range(6):
            losses = [w[0] - w[1], w[1] + w[2], w.sum()] if k % 2 else [w[0] - w[1], None, w.sum()]
            monitor.update(mtlfast.backward(losses, PCGrad(), shared=[w]), loss_scale=torch.ones((), device="cuda"))
            monitor.log(sink)

    train()
    with waiting_is_an_error():
        train()
    monitor.flush()
    assert [step for step, _ in written] == list(range(1, 13))
    assert written[-1][1] == monitor.statistics().scalars()


@pytest.mark.cuda
def test_a_run_goes_on_on_a_gpu_from_a_state_on_the_cpu():
    whole = fed(ConflictMonitor(window=3), 4, ROWS, weights=[1, 1, 1])
    moved = ConflictMonitor(window=3)
    moved.load_state_dict(whole.state_dict())
    for _ in range(5):
        result = step_of([[1.0, 2.0], [-3.0, 1.0], [0.0, 1.0]], weights=[1, 2, 1], losses=[3, 2, 1])
        whole.update(result)
        tensors = {name: getattr(result, name).cuda() for name in ("losses", "weights", "gram")}
        moved.update(dataclasses.replace(result, **tensors))
    assert moved.statistics().scalars() == pytest.approx(whole.statistics().scalars())
    assert moved.report() == whole.report()


def test_updates_in_inference_mode_and_after():
    monitor = ConflictMonitor(window=2)
    with torch.inference_mode():
        fed(monitor, 1, ROWS)
    fed(monitor, 4, ROWS)
    assert monitor.statistics().steps == 2


def test_the_monitor_keeps_no_graph_and_no_result():
    monitor = ConflictMonitor()
    result = step_of(ROWS)
    result.losses.requires_grad_()
    monitor.update(result)
    before = monitor.statistics().scalars()
    with torch.no_grad():
        result.losses.fill_(7)
        result.gram.fill_(7)
    assert monitor.statistics().scalars() == before


def test_a_reset_monitor_is_as_new():
    monitor = fed(ConflictMonitor(window=3), 7, ROWS, names=["a", "b", "c"])
    monitor.reset()
    assert (monitor.steps, monitor.names) == (0, ())
    fed(monitor, 2, [[1.0, 0.0], [0.0, 1.0]], groups=None, names=["x", "y"])
    assert monitor.statistics().steps == 2


@pytest.mark.parametrize("steps", [0, 2, 5, 13])
@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_a_resumed_monitor_goes_on_as_if_never_stopped(names, steps, tmp_path):
    whole = fed(ConflictMonitor(names, window=5), steps, ROWS, weights=[1, 2, 3])
    torch.save(whole.state_dict(), tmp_path / "state")
    resumed = ConflictMonitor(names, window=5)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for monitor in (whole, resumed):
        for k in range(12):
            monitor.update(step_of([[1.0, k], [k, -1.0], [1.0, 1.0]], weights=[1, 1, k], losses=[k, 1, 1]))
    assert resumed.statistics().scalars() == whole.statistics().scalars()
    assert resumed.report() == whole.report()
    assert (resumed.steps, resumed.names) == (whole.steps, whole.names)


def test_a_saved_state_is_a_copy():
    monitor = fed(ConflictMonitor(window=2), 5, ROWS)
    state = monitor.state_dict()
    kept = copy.deepcopy(state)
    other = ConflictMonitor(window=2)
    other.load_state_dict(state)
    fed(monitor, 3, [[1.0], [1.0], [1.0]])
    fed(other, 3, [[1.0], [1.0], [1.0]])
    assert torch.equal(state["rings"]["gram"], kept["rings"]["gram"])
    assert torch.equal(state["history"]["losses"], kept["history"]["losses"])
