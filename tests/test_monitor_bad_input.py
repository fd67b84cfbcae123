"""What `ConflictMonitor` refuses: one sentence, and nothing changes."""

import re

import pytest
import torch
from monitored import fed, step_of

import mtlfast
from mtlfast.aggregation import Sum
from mtlfast.monitor import ConflictMonitor

ROWS = [[3.0, 4.0], [-2.0, 0.0]]


@pytest.mark.parametrize("window", [0, -1, 1.5, "9", None, True])
def test_the_window_is_at_least_one_step(window):
    with pytest.raises(ValueError, match=r"^ConflictMonitor: window is .*, expected an integer of at least 1$"):
        ConflictMonitor(window=window)


@pytest.mark.parametrize("names", ["ab", [], [1, 2], 3, ["a", None]])
def test_names_are_names(names):
    with pytest.raises(ValueError, match=r"^ConflictMonitor: names is .*, expected a list of the tasks' names$"):
        ConflictMonitor(names)


def test_names_are_different():
    with pytest.raises(ValueError, match=r"^ConflictMonitor: names has 'a' twice, expected different names$"):
        ConflictMonitor(["a", "b", "a"])


def refused(monitor: ConflictMonitor, result: object, error: type[Exception], message: str, **others) -> None:
    """The update raises with exactly this message, and the monitor stays as it was."""
    before = monitor.state_dict()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        monitor.update(result, **others)
    after = monitor.state_dict()
    rings = [state.pop("rings") for state in (before, after)]
    history = [state.pop("history") for state in (before, after)]
    assert before == after
    assert (rings[0] is None) == (rings[1] is None)
    for old, new in ([] if rings[0] is None else [rings]) + [history]:
        for name in old:
            torch.testing.assert_close(old[name], new[name], rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=["new", "used"])
def monitor(request) -> ConflictMonitor:
    """With two named tasks."""
    monitor = ConflictMonitor(["a", "b"], window=3)
    return fed(monitor, 4, ROWS) if request.param == "used" else monitor


def test_a_result_without_its_gram_matrix(monitor):
    w = torch.nn.Parameter(torch.zeros(2))
    result = mtlfast.backward([w[0], w[1]], Sum(), shared=[w])
    refused(
        monitor,
        result,
        ValueError,
        "ConflictMonitor.update: the result has no Gram matrix, expected one: pass diagnostics=True to "
        "mtlfast.backward",
    )


@pytest.mark.parametrize("result", [None, [torch.ones(2)], torch.ones(2, 2), {"gram": 1}])
def test_no_result_of_a_step(monitor, result):
    kind = type(result).__name__
    message = f"ConflictMonitor.update: got a {kind}, expected the StepResult of mtlfast.backward"
    refused(monitor, result, TypeError, message)


def test_more_tasks_than_names(monitor):
    message = "ConflictMonitor.update: got task 2, expected 2 tasks as names says"
    refused(monitor, step_of([[1.0]] * 3), ValueError, message)
    refused(monitor, step_of([[1.0]] * 2, tasks=[0, 2]), ValueError, message)


def test_other_names_than_those_given(monitor):
    message = "ConflictMonitor.update: task 1 is named 'c', expected 'b'"
    refused(monitor, step_of(ROWS, names=["a", "c"]), ValueError, message)


def test_other_names_than_before():
    monitor = fed(ConflictMonitor(), 2, ROWS, names=["x", "y"])
    refused(
        monitor,
        step_of(ROWS, names=["y", "x"]),
        ValueError,
        "ConflictMonitor.update: task 0 is named 'y', expected 'x'",
    )
    refused(
        monitor,
        step_of([*ROWS, [1.0, 1.0]], names=["x", "y", "x"]),
        ValueError,
        "ConflictMonitor.update: task 2 is named 'x', as task 0 is",
    )


def test_other_groups_than_before():
    monitor = fed(ConflictMonitor(), 2, ROWS)
    refused(
        monitor,
        step_of([ROWS], groups=["a"]),
        ValueError,
        "ConflictMonitor.update: the result's groups are ('a',), expected None as in the steps before; reset() forgets "
        "these",
    )


@pytest.mark.parametrize("loss_scale", [0, -1.0, float("nan"), "8", torch.ones(2)])
def test_a_loss_scale_is_one_number_above_0(monitor, loss_scale):
    what = "has shape [2], expected a number" if isinstance(loss_scale, torch.Tensor) else None
    what = what or f"is {loss_scale!r}, expected a number above 0"
    refused(monitor, step_of(ROWS), ValueError, f"ConflictMonitor.update: loss_scale {what}", loss_scale=loss_scale)


def test_reading_before_the_first_step_and_an_unknown_group():
    with pytest.raises(ValueError, match=r"^ConflictMonitor.statistics: nothing has been seen, expected an update"):
        ConflictMonitor().statistics()
    monitor = fed(ConflictMonitor(), 1, [ROWS, ROWS], groups=["a", "b"])
    with pytest.raises(ValueError, match=r"^ConflictMonitor.statistics: group is 'c', expected one of a, b$"):
        monitor.statistics("c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a", "c"]}, "the state is of the tasks a, c, expected a, b"),
        ({"names": ["a", "b", "c"]}, "the state is of the tasks a, b, c, expected a, b"),
        ({"window": 4}, "the state is of a window of 4 steps, expected 3"),
        ({"rings": ...}, "the state has no rings, expected what state_dict() returned"),
    ],
)
def test_a_state_that_does_not_fit(monitor, change, message):
    state = fed(ConflictMonitor(["a", "b"], window=3), 5, ROWS).state_dict() | change
    state = {name: value for name, value in state.items() if value is not ...}
    before = monitor.report()
    with pytest.raises(ValueError, match=f"^{re.escape(f'ConflictMonitor.load_state_dict: {message}')}$"):
        monitor.load_state_dict(state)
    assert monitor.report() == before


def test_a_run_that_goes_on_with_other_tasks():
    state = fed(ConflictMonitor(window=3), 5, ROWS, names=["a", "b"]).state_dict()
    monitor = ConflictMonitor(window=3)
    monitor.load_state_dict(state)
    refused(
        monitor,
        step_of(ROWS, names=["a", "c"]),
        ValueError,
        "ConflictMonitor.update: task 1 is named 'c', expected 'b'",
    )
    with pytest.raises(ValueError, match="has no window, expected what state_dict"):
        monitor.load_state_dict([1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"single": {"a": 1, "c": 2}}, "single has a, c, expected a, b"),
        ({"joint": [1]}, "joint is [1], expected an entry for each of a, b"),
        ({"joint": 1.0}, "joint is 1.0, expected an entry for each of a, b"),
        ({"single": ["x", 1]}, "single of a is 'x', expected n finite numbers"),
        ({"joint": [[], 1]}, "joint of a is [], expected n finite numbers"),
        ({"joint": [1, float("nan")]}, "joint of b is [nan], expected n finite numbers"),
        ({"higher_is_better": "yes"}, "higher_is_better is 'yes', expected an entry for each of a, b"),
        ({"higher_is_better": [True, 1]}, "higher_is_better of b is 1, expected True or False"),
        ({"higher_is_better": {"a": True}}, "higher_is_better has a, expected a, b"),
    ],
)
def test_metrics_that_do_not_fit(monitor, arguments, message):
    fitting = {"single": [1, 2], "joint": {"b": 1, "a": 2}, "higher_is_better": True}
    with pytest.raises(ValueError, match=f"^{re.escape(f'ConflictMonitor.compare: {message}')}$"):
        monitor.compare(**fitting | arguments)


@pytest.mark.parametrize("single", [[], {}, 3.0])
def test_metrics_of_no_task(single):
    with pytest.raises(ValueError, match=r"^ConflictMonitor.compare: single is .*, expected each task's metric$"):
        ConflictMonitor().compare(single=single, joint=[1], higher_is_better=True)
