"""What `ConflictMonitor` says in words: conflicts, dominance and trends while they are there, and at no other time."""

import re

import pytest
import torch
from monitored import fed, step_of

from mtlfast import aggregation, weighting
from mtlfast.monitor import ConflictMonitor

WINDOW = 50


def found(monitor: ConflictMonitor, kind: str) -> list[tuple[str, ...]]:
    return [finding.tasks for finding in monitor.findings() if finding.kind == kind]


def noisy(cosine: float, generator: torch.Generator, size: int = 200, noise: float = 2.0) -> torch.Tensor:
    """Three gradients [3, size], the first two of which have about this cosine up to a lot of noise."""
    first = torch.zeros(size, dtype=torch.float64)
    first[0] = 20
    second = torch.zeros(size, dtype=torch.float64)
    second[0], second[1] = 20 * cosine, 20 * (1 - cosine**2) ** 0.5
    third = torch.zeros(size, dtype=torch.float64)
    third[2] = 20
    return torch.stack([first, second, third]) + noise * torch.randn(3, size, dtype=torch.float64, generator=generator)


def flagged(cosine_at, steps: int, seed: int = 0, **others) -> list[int]:
    """The steps after which tasks 0 and 1 were said to conflict. No other pair may be, at any step."""
    generator, monitor, at = torch.Generator().manual_seed(seed), ConflictMonitor(window=WINDOW), []
    for step in range(steps):
        monitor.update(step_of(noisy(cosine_at(step), generator, **others)))
        pairs = found(monitor, "conflict")
        assert pairs in ([], [("task 0", "task 1")])
        if pairs:
            at.append(step)
    return at


@pytest.mark.parametrize("seed", range(3))
def test_a_conflict_from_step_200_on_is_said_then_and_not_before(seed):
    at = flagged(lambda step: 0.4 if step < 200 else -0.4, 320, seed)
    assert 200 <= at[0] < 200 + WINDOW
    assert at == list(range(at[0], 320))


@pytest.mark.parametrize("seed", range(3))
def test_a_conflict_that_ends_at_step_200_is_said_no_longer(seed):
    at = flagged(lambda step: -0.4 if step < 200 else 0.4, 320, seed)
    assert at[0] == 19  # the 20th step is the first that says anything
    assert 200 <= at[-1] < 200 + WINDOW
    assert at == list(range(19, at[-1] + 1))


@pytest.mark.parametrize("size", [3, 30, 1000])
def test_random_gradients_are_no_conflict(size):
    assert flagged(lambda step: 0.0, 200, size=size, noise=1e6) == []


@pytest.mark.parametrize("seed", range(5))
def test_random_gradients_in_many_groups_are_no_conflict(seed):
    generator, monitor = torch.Generator().manual_seed(seed), ConflictMonitor()
    groups = [f"layer {k}" for k in range(400)]
    for _ in range(20):
        monitor.update(step_of(torch.randn(400, 3, 16, generator=generator), groups=groups))
    assert found(monitor, "conflict") == []


def test_gradients_that_conflict_and_agree_in_turn_are_no_persistent_conflict():
    assert flagged(lambda step: 0.5 * (-1) ** step, 200) == []


def test_gradients_that_are_nearly_orthogonal_are_no_conflict():
    assert found(fed(ConflictMonitor(), 100, [[1.0, 0.0], [-0.04, 1.0]]), "conflict") == []
    assert found(fed(ConflictMonitor(), 100, [[1.0, 0.0], [-0.06, 1.0]]), "conflict") != []


def test_a_conflict_in_the_lesser_part_of_the_steps_is_not_persistent():
    monitor = ConflictMonitor()
    for step in range(100):
        monitor.update(step_of([[1.0, 0.0], [-1.0 if step % 5 < 2 else 0.01, 0.1]]))
    assert monitor.statistics().cosines[0, 1] < -0.3
    assert found(monitor, "conflict") == []


def test_the_words_for_a_conflict():
    rows = [[1.0, 0.0], [-0.31, (1 - 0.31**2) ** 0.5]]
    monitor = fed(ConflictMonitor(window=500), 500, rows, names=["left digit", "reconstruct"])
    (finding,) = [finding for finding in monitor.findings() if finding.kind == "conflict"]
    assert finding.text == "left digit against reconstruct: cosine -0.31 over 500 steps, negative in 100 % of them."
    assert "PCGrad" in finding.advice
    assert "NormBalance" not in finding.advice
    assert "times as long" not in finding.text
    report = monitor.report().splitlines()
    assert report[0] == "2 tasks over 500 steps."
    assert f"- {finding.text}" in report
    assert f"  {finding.advice}" in report


def test_a_conflict_of_a_long_and_a_short_gradient_is_balanced_first():
    monitor = fed(ConflictMonitor(), 20, [[12.0, 0.0], [-1.0, 0.1]])
    assert "Compose(NormBalance(), PCGrad())" in monitor.findings()[0].advice
    assert monitor.findings()[0].text.endswith("; one gradient is 12 times as long as the other.")


def test_a_conflict_in_one_group_alone():
    rows = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[9.0, 0.0], [9.0, 1.0]], [[3.0, 1.0], [3.0, 0.0]]])
    monitor = fed(ConflictMonitor(), 30, rows, groups=["first", "second", "third"])
    (finding,) = [finding for finding in monitor.findings() if finding.kind == "conflict"]
    assert finding.text == "task 0 against task 1: no conflict over all parameters, but in some groups (first -1.00)."
    assert "groups=" in finding.advice
    rows[1] *= -torch.tensor([[1.0], [-1.0]])
    monitor = fed(ConflictMonitor(), 30, rows, groups=["first", "second", "third"])
    (finding,) = [finding for finding in monitor.findings() if finding.kind == "conflict"]
    assert finding.text.endswith("(first -1.00, second -0.99).")


def test_a_task_that_dominates_and_why():
    rows = [[40.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    monitor = fed(ConflictMonitor(["a", "b", "c"]), 20, rows, weights=[1, 1, 1])
    (finding,) = [finding for finding in monitor.findings() if finding.kind == "dominates"]
    assert finding.tasks == ("a",)
    assert "95 % of the summed lengths" in finding.text
    assert "40 times as long as the shortest" in finding.text
    assert "IMTLG" in finding.advice
    balanced = fed(ConflictMonitor(["a", "b", "c"]), 20, rows, weights=[1 / 40, 1, 1])
    assert found(balanced, "dominates") == []
    by_weight = fed(ConflictMonitor(["a", "b", "c"]), 20, torch.eye(3), weights=[1, 1, 50])
    assert found(by_weight, "dominates") == [("c",)]
    assert "weight" in by_weight.findings()[0].advice
    element_wise = fed(ConflictMonitor(["a", "b", "c"]), 20, rows)
    assert "a dominates the gradients" in element_wise.report()
    assert found(fed(ConflictMonitor(["a", "b", "c"]), 19, rows), "dominates") == []


def test_a_task_that_has_little_of_the_update():
    rows = [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 1.0]]
    monitor = fed(ConflictMonitor(["a", "b", "c"]), 20, rows, weights=[1, 1, 1])
    assert (found(monitor, "dominates"), found(monitor, "starves")) == ([], [("c",)])
    assert "- c has little of the update: 5.3 % of the summed lengths are its own." in monitor.report().splitlines()
    assert found(fed(ConflictMonitor(), 20, rows, weights=[1, 1, 9]), "starves") == []


def test_a_task_without_a_part_in_the_update():
    rows = [[1.0, 0.0], [0.0, 0.0]]
    lines = fed(ConflictMonitor(["a", "b"]), 20, rows, weights=[1, 1]).report().splitlines()
    assert lines[1] == "- b has no part in the update: its gradient is 0 in every step."
    assert "reaches the shared parameters" in lines[2]
    finding = fed(ConflictMonitor(), 20, torch.eye(2), weights=[1, 0]).findings()[0]
    assert (finding.kind, finding.tasks) == ("starves", ("task 1",))
    assert finding.text.endswith("its weight is 0 in every step.")
    once = fed(fed(ConflictMonitor(), 20, rows, weights=[1, 1]), 1, torch.eye(2), weights=[1, 1])
    assert "no part" not in once.report()
    assert found(fed(ConflictMonitor(), 19, rows), "starves") == []


def test_absent_tasks_are_said():
    monitor = fed(ConflictMonitor(["a", "b", "c"], window=20), 20, torch.eye(2))
    assert "Absent from every step that counts: c." in monitor.report().splitlines()
    assert "Absent" not in fed(monitor, 1, torch.eye(3)).report()


def test_one_is_written_in_the_singular():
    first, few = fed(ConflictMonitor(), 1, [[1.0]]).report().splitlines()
    assert first == "1 task over 1 step."
    assert few.startswith("1 step that counts is too few")


def test_a_huge_ratio_is_short():
    text = fed(ConflictMonitor(), 20, [[1e9, 0.0], [-1.0, 1.0]]).findings()[0].text
    assert text.endswith("; one gradient is 7e+08 times as long as the other.")


def test_advice_that_several_findings_share_is_given_once():
    report = fed(ConflictMonitor(), 20, [[1.0, 0.0], [-1.0, 1.0], [0.1, -1.0]]).report()
    assert report.count("against") == 2 + 1  # and once in the advice
    assert report.count("Try PCGrad") == 1


def trained(loss_at, steps: int, tasks: int = 3, noise: float = 0.02, window: int = WINDOW) -> ConflictMonitor:
    """A run whose losses are loss_at(task, step), up to noise."""
    generator, monitor = torch.Generator().manual_seed(1), ConflictMonitor([*"abc"][:tasks], window=window)
    for step in range(steps):
        losses = torch.tensor([loss_at(k, step) for k in range(tasks)], dtype=torch.float64)
        losses += noise * torch.randn(tasks, dtype=torch.float64, generator=generator)
        monitor.update(step_of(torch.eye(tasks), losses=losses))
    return monitor


def test_a_loss_that_stalls_while_others_fall():
    monitor = trained(lambda k, step: 0.5 if k == 1 and step > 60 else 3 - 0.01 * step, 200)
    assert found(monitor, "stalls") == [("b",)]
    assert found(monitor, "rises") == []
    assert "b: its loss has stalled, 0.5" in monitor.report()


def test_losses_that_fall_are_not_mentioned():
    monitor = trained(lambda k, step: 3 - 0.01 * step, 200)
    assert monitor.findings() == []
    assert monitor.report().endswith("each task has a share of the update, and no loss has stalled or rises.")


def test_all_losses_that_stall_are_said_once():
    assert found(trained(lambda k, step: 1.0, 200), "stalls") == [("a", "b", "c")]


def test_a_loss_that_rises():
    monitor = trained(lambda k, step: 1 + 0.01 * step if k == 2 else 3 - 0.01 * step, 100)
    assert found(monitor, "rises") == [("c",)]


def test_a_loss_above_its_lowest_of_the_run_rises_even_if_it_is_flat_now():
    def loss_at(k, step):
        return (1.0 if step < 100 else 2.0) if k == 0 else 9 - 0.01 * step

    monitor = trained(loss_at, 400)
    assert found(monitor, "rises") == [("a",)]
    assert found(monitor, "stalls") == []
    text = next(finding.text for finding in monitor.findings() if finding.kind == "rises")
    lowest, now = map(float, re.findall(r"\d\.\d+|\d(?= )", text))
    assert lowest == pytest.approx(1, abs=0.02)
    assert now == pytest.approx(2, abs=0.02)


def test_a_loss_scale_that_grows_is_no_rise():
    monitor = ConflictMonitor(window=WINDOW)
    for step in range(200):
        scale = 2.0 ** (step // 20)
        monitor.update(step_of(torch.eye(2), losses=[3 - 0.01 * step] * 2, loss_scale=scale), loss_scale=scale)
    assert found(monitor, "rises") == []


def test_an_empty_monitor_says_that_nothing_has_been_seen():
    for monitor in (ConflictMonitor(), ConflictMonitor(["a", "b"])):
        assert monitor.report() == "Nothing has been seen yet."
        assert monitor.findings() == []


def test_few_steps_say_nothing():
    monitor = fed(ConflictMonitor(), 19, [[1.0], [-1.0]])
    assert monitor.findings() == []
    assert "19 steps that count are too few" in monitor.report()
    assert found(fed(monitor, 1, [[1.0], [-1.0]]), "conflict")


def test_steps_that_are_not_finite_are_said():
    monitor = fed(ConflictMonitor(window=60), 70, [[1.0], [1.0]])
    fed(monitor, 3, [[1.0], [float("nan")]])
    assert monitor.report().startswith(
        "2 tasks over the last 60 steps, 3 of which had something that is not finite and do not count."
    )
    assert "0 steps that count" in fed(ConflictMonitor(), 30, [[1.0], [float("inf")]]).report()


def test_every_method_that_is_advised_is_there():
    conflicts = fed(ConflictMonitor(), 30, [[12.0, 0.0], [-1.0, 0.1]], losses=[1, 2])
    groups = fed(ConflictMonitor(), 30, [[[1.0], [-1.0]], [[9.0], [9.0]]], groups=["a", "b"])
    by_weight = fed(ConflictMonitor(), 30, torch.eye(2), weights=[1, 50])
    starved = fed(ConflictMonitor(), 30, torch.eye(3), weights=[9, 9, 1])
    monitors = [conflicts, groups, by_weight, starved, trained(lambda k, step: 1 - 0.1 * step if k else step, 100)]
    monitors.append(trained(lambda k, step: 1 - 0.1 * step if k else 0, 100))
    advice = [finding.advice for monitor in monitors for finding in monitor.findings()]
    assert {finding.kind for monitor in monitors for finding in monitor.findings()} == {
        "conflict",
        "dominates",
        "starves",
        "stalls",
        "rises",
    }
    named = {word for text in advice for word in re.findall(r"\b(?:[A-Z]+[a-z]*){2,}\b", text)} - {"It", "Try"}
    assert named >= {"PCGrad", "UPGrad", "IMTLG", "NashMTL", "GradNorm", "CAGrad", "FAMO"}
    assert all(hasattr(aggregation, name) or hasattr(weighting, name) for name in named)


def test_comparing_with_single_task_training():
    monitor = fed(ConflictMonitor(["left", "right", "error"]), 20, [[1.0, 0.0], [-1.0, 1.0], [0.0, 3.0]])
    comparison = monitor.compare(
        single={"left": 90, "right": [80, 82], "error": 2.0},
        joint=[85, [81, 81.5], torch.tensor(1.5)],
        higher_is_better={"left": True, "right": True, "error": False},
    )
    assert comparison.gains == (-5, 0.25, 0.5)
    assert comparison.signs == (-1, 0, 1)
    assert comparison.negative_transfer == ("left",)
    assert comparison.delta == pytest.approx((-5 / 90 + 0.25 / 81 + 0.5 / 2) * 100 / 3)
    left, right, error, delta, chance = str(comparison).splitlines()
    assert left == (
        "left: 90 alone, 85 jointly: worse jointly, a negative transfer. Its gradient conflicts most with that of "
        "right, in 100 % of the steps."
    )
    assert right == ("right: 81 alone, 81.25 jointly, standard error of the difference 1: no clear difference.")
    assert error == "error: 2 alone, 1.5 jointly: better jointly."
    assert delta.startswith("Delta-m: +6.58 %")
    assert chance.startswith("With one run each")


def test_a_comparison_needs_no_steps():
    comparison = ConflictMonitor().compare(single={"a": 1.0, "b": 0.0}, joint={"b": 1, "a": 2}, higher_is_better=True)
    assert (comparison.names, comparison.gains) == (("a", "b"), (1, 1))
    assert "Delta-m" not in str(comparison)  # a relative gain over 0
    seeds = ConflictMonitor().compare(single=[[1.0, 1.1, 0.9]], joint=[[2, 2.1, 1.9]], higher_is_better=False)
    assert seeds.negative_transfer == ("task 0",)
    assert "With one run" not in str(seeds)
