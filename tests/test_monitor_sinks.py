"""Where `ConflictMonitor` writes: event files read back, JSON lines, an object like a wandb run; and the picture."""

import json
import math
import sys

import pytest
import torch
from monitored import fed, step_of

from mtlfast.monitor import ConflictMonitor, _monitor
from mtlfast.monitor._reading import Reading

ROWS = [[3.0, 4.0], [-2.0, 0.0], [0.0, 0.5]]


class Run:
    """Stands in for a run of wandb."""

    def __init__(self):
        self.lines = []

    def log(self, values, step=None):
        self.lines.append((step, values))


def test_event_files_of_tensorboard_can_be_read_back(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = ConflictMonitor(["depth", "edges", "normals"], window=3)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        expected = []
        for k in range(4):
            monitor.update(step_of(ROWS, losses=[k, 1, 2], weights=[1, k, 1]))
            monitor.log(writer, step=10 * k)
            expected.append(monitor.statistics().scalars())
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(expected[0])
    assert "cosine/depth against edges" in expected[0]
    for name in expected[0]:
        written = events.Scalars(name)
        assert [event.step for event in written] == [0, 10, 20, 30]
        assert [event.value for event in written] == pytest.approx([values[name] for values in expected])


def test_json_lines(tmp_path):
    monitor = ConflictMonitor(window=3)
    for path in (tmp_path / "lines", str(tmp_path / "lines")):
        fed(monitor, 2, ROWS)
        monitor.log(path)
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line.pop("step") for line in lines] == [2, 4]
    assert lines[-1] == monitor.statistics().scalars()
    assert lines[-1]["cosine/task 0 against task 1"] == pytest.approx(-0.6)


def test_a_run_like_those_of_wandb():
    monitor, run = ConflictMonitor(), Run()
    monitor.log(run)
    assert run.lines == []  # nothing has been seen
    fed(monitor, 2, ROWS)
    monitor.log(run)
    monitor.log(run, step=7)
    assert run.lines == [(2, monitor.statistics().scalars()), (7, monitor.statistics().scalars())]


def test_what_is_not_known_or_not_finite_is_left_out():
    monitor, run = ConflictMonitor(), Run()
    monitor.log(run)
    fed(monitor, 2, [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    monitor.log(run)
    ((_, values),) = run.lines
    assert all(math.isfinite(value) for value in values.values())
    assert "condition number" not in values  # it is infinite
    assert "cosine/task 0 against task 2" not in values
    assert "norm/task 2" not in values
    assert "weight/task 0" not in values


def test_groups_are_written_if_asked():
    monitor, run = ConflictMonitor(), Run()
    fed(monitor, 2, [[[1.0], [-1.0]], [[1.0], [1.0]]], groups=["a", "b"])
    monitor.log(run)
    monitor.log(run, groups=True)
    without, with_groups = (values for _, values in run.lines)
    assert without == {name: value for name, value in with_groups.items() if name in without}
    assert with_groups["a/cosine/task 0 against task 1"] == -1
    assert with_groups["b/conflict rate/task 0 against task 1"] == 0
    assert "a/loss/task 0" not in with_groups


def test_numbers_on_their_way_are_written_later_in_order(monkeypatch):
    arrived = set()

    class Slow(Reading):
        def __init__(self, rings):
            self.rings = rings.each(lambda x: x.clone())
            self._arrived = None

        def ready(self):
            return self in arrived

    made = []
    monkeypatch.setattr(_monitor, "Reading", lambda rings: made.append(Slow(rings)) or made[-1])
    monitor, run, expected = ConflictMonitor(window=2), Run(), []
    for k in range(4):
        monitor.update(step_of(ROWS, losses=[k, 1, 2]))
        if k == 2:
            arrived.add(made[1])  # the second before the first
        monitor.log(run)
        expected.append([max(0, k - 0.5), 1, 2])
        if k == 2:
            assert run.lines == []
            arrived.add(made[0])
    assert [step for step, _ in run.lines] == [1, 2]
    monitor.flush()
    monitor.flush()
    assert [step for step, _ in run.lines] == [1, 2, 3, 4]
    assert [[values[f"loss/task {k}"] for k in range(3)] for _, values in run.lines] == expected


@pytest.mark.parametrize("sink", [None, 3, ["path"], object()])
def test_what_is_no_sink_is_refused(sink):
    with pytest.raises(TypeError, match=r"^ConflictMonitor.log: sink is a \w+, expected a SummaryWriter, the path"):
        ConflictMonitor().log(sink)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_the_picture_of_an_empty_monitor_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    figure = ConflictMonitor().plot()
    assert "Nothing has been seen yet." in texts(figure)
    figure.savefig(tmp_path / "empty.png")


def test_the_picture_shows_the_cosines_and_the_run(tmp_path):
    pytest.importorskip("matplotlib")
    monitor = ConflictMonitor(["depth", "edges", "normals"], window=10)
    for k in range(47):
        monitor.update(step_of(ROWS if k > 20 else ROWS[:2], losses=[50 - k, 2, 3][: 3 if k > 20 else 2]))
    figure = monitor.plot()
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    matrix, cosines, losses, shares, _ = figure.axes
    assert matrix.images[0].get_array().tolist()[0] == pytest.approx([1, -0.6, 0.8])
    assert "-0.60\n100 %" in texts(figure)
    assert [line.get_label() for line in cosines.lines[:3]] == [
        "depth against edges",
        "edges against normals",
        "depth against normals",
    ]
    depth, _, normals = losses.lines
    assert depth.get_xdata().tolist() == [5, 15, 25, 38, 40, 42, 44, 46]
    assert depth.get_ydata().tolist() == pytest.approx([45.5, 35.5, 25.5, 12.5, 10.5, 8.5, 6.5, 4.5])
    assert [math.isnan(y) for y in normals.get_ydata()[:3]] == [True, True, False]
    assert losses.get_yscale() == "log"
    assert shares.lines[0].get_ydata()[-1] == pytest.approx(5 / 7.5)


@pytest.mark.parametrize(
    ("rows", "losses"),
    [([[1.0]], None), ([[1.0]] * 12, [-1.0] * 12), ([[math.nan], [1.0]], None)],
    ids=["one task", "many", "not finite"],
)
def test_odd_runs_can_be_drawn(rows, losses, tmp_path):
    pytest.importorskip("matplotlib")
    fed(ConflictMonitor(), 1, rows, losses=losses).plot().savefig(tmp_path / "picture.png")


def test_the_picture_has_a_map_of_groups():
    pytest.importorskip("matplotlib")
    monitor = fed(ConflictMonitor(), 3, [[[1.0], [-1.0]], [[1.0], [1.0]]], groups=["a", "b"])
    maps = [axes for axes in monitor.plot().axes if axes.images and axes.get_title() == "mean cosine in each group"]
    assert maps[0].images[0].get_array().tolist() == [[-1, 1]]


def test_many_tasks_are_drawn_without_names(tmp_path):
    pytest.importorskip("matplotlib")
    shown = {}
    for tasks in (10, 40):
        groups = [f"group {k}" for k in range(tasks)]
        figure = fed(ConflictMonitor(), 2, torch.ones(tasks, tasks, 1), groups=groups).plot()
        figure.savefig(tmp_path / "picture.png")  # a warning, such as one of no room, is an error
        shown[tasks] = texts(figure)
    assert {"task 9", "group 9", "1.00\n0 %"} <= set(shown[10])
    assert not {"task 9", "group 9", "1.00\n0 %"} & set(shown[40])
    assert "mean cosine in each group, 10 lowest pairs" in shown[40]


def test_without_matplotlib_one_sentence_asks_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "mtlfast.monitor._plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(
        ImportError, match=r"^ConflictMonitor.plot: draws with matplotlib: type `pip install matplotlib`$"
    ):
        ConflictMonitor().plot()
