"""`ConflictMonitor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtlfast._loss_scale import check_loss_scale, plain_number
from mtlfast._settings import Whole
from mtlfast.monitor._comparison import Better, Comparison, Metrics, compared
from mtlfast.monitor._findings import Finding, findings_of, in_words
from mtlfast.monitor._history import Means
from mtlfast.monitor._names import check_names, joined_names, shown_names
from mtlfast.monitor._reading import Reading
from mtlfast.monitor._result import Result, gram_of
from mtlfast.monitor._rings import Rings
from mtlfast.monitor._saved import Saved
from mtlfast.monitor._sinks import Sink, Waiting, writer_of
from mtlfast.monitor._statistics import Statistics
from mtlfast.monitor._steps import Steps
from mtlfast.monitor._trends import Trends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASS = "ConflictMonitor"
EMPTY = "Nothing has been seen yet."


class ConflictMonitor:
    """Watches the tasks' gradients, weights and losses over the last steps, and says what it sees.

    Give it the result of each step. The numbers of the last `window` steps stay on the device, where `update` copies
    them in a few small operations, without waiting for a GPU. All else is computed when it is asked for. So a change
    shows once it has filled a good part of the window. The mean of each whole window is kept for the length of the run.

    A task that is absent from a step does not count in it. A step with a loss or a gradient that is not finite, such as
    one that a GradScaler skips, counts for nothing but the number of such steps.

    Args:
        names: the n tasks' names, in the order of the losses. None: the names of a dict of losses, or numbers.
        window: how many of the last steps count.

    Raises:
        ValueError: `window` is not an integer of at least 1, or `names` are not different names.

    The monitor watches what the aggregator sees: with a weighting, the gradients of the weighted losses. Its losses are
    those before the weighting.

    Memory: 8 * window * (G * n**2 + G * n + n + 1) bytes on the device, for G groups, 1 without groups; and a small
    row for each whole window. Cost: four small copies a step where the method computes the Gram matrix anyway. With
    another method `diagnostics=True` costs one `gram`, a read of all task gradients.

    Example:
        >>> import torch, mtlfast
        >>> from mtlfast.aggregation import PCGrad
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> monitor = mtlfast.monitor.ConflictMonitor(["depth", "edges"], window=100)
        >>> print(monitor.report())
        Nothing has been seen yet.
        >>> for _ in range(100):
        ...     step = mtlfast.backward([3 * w[0] + 4 * w[1], -2 * w[0]], PCGrad(), shared=[w])
        ...     monitor.update(step)
        >>> monitor.statistics().cosines
        tensor([[ 1.0000, -0.6000],
                [-0.6000,  1.0000]], dtype=torch.float64)
        >>> print(monitor.findings()[0].text)
        depth against edges: cosine -0.60 over 100 steps, negative in 100 % of them.
    """

    window = Whole(1)

    def __init__(self, names: Sequence[str] | None = None, window: int = 500) -> None:
        self.window = window
        self._given = None if names is None else check_names(CLASS, names)
        self._waiting: list[Waiting] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all that it has seen, as if new."""
        self._names: list[str | None] = list(self._given or ())
        self._groups: tuple[str, ...] | None = None
        self._rings: Rings | None = None
        self._history: list[Means] = []
        self._steps = 0

    @property
    def steps(self) -> int:
        """The number of steps that it has been given."""
        return self._steps

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names; "task k" for a task without one."""
        return shown_names(self._names)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups of parameters; empty without groups."""
        return self._groups or ()

    def update(self, result: Result, *, loss_scale: float | Tensor | None = None) -> None:
        """Takes a step's numbers. It does not wait for a GPU.

        Args:
            result: what `mtlfast.backward` returned, with its Gram matrix.
            loss_scale: what `mtlfast.backward` was given as such. Losses and lengths are divided by it. Below a
                GradScaler leave it out and the losses seem to rise whenever the scale does.

        Raises:
            ValueError: the result has no Gram matrix, or its tasks, their names or its groups are not those of this
                monitor. It then stays as it was.
            TypeError: it is not the result of a step.
        """
        caller = f"{CLASS}.update"
        result, gram = gram_of(caller, result)
        names = joined_names(caller, self._names, self._given is not None, result.tasks, result.names)
        if self._rings is not None and result.groups != self._groups:
            raise ValueError(
                f"{caller}: the result's groups are {result.groups}, expected {self._groups} as in the steps before; "
                "reset() forgets these"
            )
        scale = plain_number(loss_scale)
        if scale is not None:
            check_loss_scale(caller, scale)
        # In inference mode new buffers would be tensors that no later step could write to.
        with torch.inference_mode(False), torch.no_grad():
            rings = self._rings_for(gram, len(names))
            of_groups = gram if gram.dim() == 3 else gram.unsqueeze(0)
            weights = result.weights
            if weights is not None and weights.dim() == 1:
                weights = weights.unsqueeze(0)
            row = self._steps % self.window
            rings.write(row, result.tasks, of_groups, weights, result.losses, 1.0 if scale is None else scale)
            self._rings, self._names, self._groups = rings, names, result.groups
            self._steps += 1
            if self._steps % self.window == 0:
                self._history.append(Means.of(Steps.of(rings)))

    def _rings_for(self, gram: Tensor, tasks: int) -> Rings:
        if self._rings is None:
            return Rings.empty(self.window, len(gram) if gram.dim() == 3 else 1, tasks, gram.device)
        rings = self._rings if self._rings.num_tasks >= tasks else self._rings.with_tasks(tasks)
        return rings if rings.scales.device == gram.device else rings.each(lambda x: x.to(gram.device))

    def statistics(self, group: str | None = None) -> Statistics:
        """The last steps in a few numbers. It waits for a GPU.

        Args:
            group: the group of parameters. None: all shared parameters.

        Raises:
            ValueError: nothing has been seen, or there is no such group.
        """
        caller = f"{CLASS}.statistics"
        if self._rings is None:
            raise ValueError(f"{caller}: nothing has been seen, expected an update before")
        if group is not None and group not in self.groups:
            raise ValueError(f"{caller}: group is {group!r}, expected one of {', '.join(self.groups) or 'none'}")
        index = None if group is None else self.groups.index(group)
        return Statistics.of(Steps.of(self._on_host(self._rings), index), self.names)

    def _on_host(self, rings: Rings) -> Rings:
        return Reading(rings).wait().in_order(self._steps)

    def _by_group(self, rings: Rings) -> dict[str, Statistics]:
        return {name: Statistics.of(Steps.of(rings, i), self.names) for i, name in enumerate(self.groups)}

    def findings(self) -> list[Finding]:
        """What a user would want to know, each with what to try. It waits for a GPU.

        These are: pairs that conflict persistently, a task that dominates the update or has little of it, and losses
        that have stalled or rise. Fewer than 20 steps say nothing.
        """
        return [] if self._rings is None else self._found(self._rings)[1]

    def _found(self, rings: Rings) -> tuple[Statistics, list[Finding]]:
        on_host = self._on_host(rings)
        steps = Steps.of(on_host)
        seen = Statistics.of(steps, self.names)
        past = Means.stacked(self._history, len(self._names)).losses
        return seen, findings_of(seen, Trends.of(steps, past), self._by_group(on_host))

    def report(self) -> str:
        """The findings in words, below a line that says what was seen. It waits for a GPU."""
        return EMPTY if self._rings is None else in_words(*self._found(self._rings), self._steps)

    def compare(self, *, single: Metrics, joint: Metrics, higher_is_better: Better) -> Comparison:
        """Compares training each task by itself with training all of them jointly. Print what it returns.

        Args:
            single: each task's metric after training by itself: a dict by name, or a list in the order of the tasks. An
                entry is a number, or a list with one for each seed.
            joint: the same after joint training.
            higher_is_better: of the metric, for all tasks or for each, as a dict or a list.

        Raises:
            ValueError: they do not fit each other or the tasks.
        """
        comparison = compared(f"{CLASS}.compare", self.names, single, joint, higher_is_better)
        return comparison if self._rings is None else comparison.beside(self.statistics())

    def log(self, sink: Sink, step: int | None = None, *, groups: bool = False) -> None:
        """Writes the statistics to a sink; nothing if nothing has been seen.

        On a GPU it does not wait: the numbers are on their way to the host when it returns, and a later call of `log`
        or `flush` writes them.

        Args:
            sink: a torch.utils.tensorboard SummaryWriter, or anything with its `add_scalar`; the path of a file, to
                which a line of JSON is added; or anything with `log(dict, step=)`, such as a run of wandb.
            step: the step to write them at. None: the number of steps that the monitor has been given.
            groups: also write those of each group, under "group/".

        Raises:
            TypeError: `sink` is none of these.
        """
        writer_of(f"{CLASS}.log", sink)
        if self._rings is None:
            return
        at = self._steps if step is None else step
        shown = self.groups if groups else ()
        self._waiting.append(Waiting(sink, at, self.names, shown, self._steps, Reading(self._rings)))
        while self._waiting and self._waiting[0].reading.ready():
            self._waiting.pop(0).write(f"{CLASS}.log")

    def flush(self) -> None:
        """Writes what `log` has not written yet. It waits for a GPU."""
        while self._waiting:
            self._waiting.pop(0).write(f"{CLASS}.log")

    def plot(self) -> Figure:
        """A picture: the mean cosines of the window, and cosines, losses and shares over the run. It waits for a GPU.

        Returns:
            A matplotlib figure; `savefig` saves it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from mtlfast.monitor._plot import drawn, nothing
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "matplotlib":
                raise
            raise ImportError(f"{CLASS}.plot: draws with matplotlib: type `pip install matplotlib`") from None
        if self._rings is None:
            return nothing(EMPTY)
        past = Means.stacked(self._history, len(self._names))
        rings = self._on_host(self._rings)
        groups = {name: of_group.cosines for name, of_group in self._by_group(rings).items()}
        steps = Steps.of(rings)
        return drawn(Statistics.of(steps, self.names), steps, self._steps, past, self.window, groups)

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen, as tensors, numbers and strings, which `torch.load(weights_only=True)` reads."""
        return Saved(self.window, self._names, self._groups, self._steps, self._rings, self._history).as_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces what it has seen by what was saved.

        Raises:
            ValueError: the state is none, or that of another window or of tasks with other names. The monitor then
                stays as it was.
        """
        saved = Saved.from_dict(f"{CLASS}.load_state_dict", state, self.window, self._given)
        self.reset()
        self._names, self._groups, self._steps = saved.names, saved.groups, saved.steps
        self._rings, self._history = saved.rings, saved.history
