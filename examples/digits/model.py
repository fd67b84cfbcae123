"""One shared trunk, one head a task."""

from __future__ import annotations

from collections.abc import Sequence

from tasks import Task
from torch import Tensor, nn

FEATURES = 128


class Network(nn.Module):
    """A small convolutional trunk with a head for each task.

    Args:
        tasks: K of them; with one alone this is that task's single-task network.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        # The trunk comes first: under one seed it starts from the same weights whatever the tasks are.
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 6 * 6, FEATURES),
            nn.ReLU(),
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, task.outputs)) for task in tasks
        )

    def forward(self, canvas: Tensor) -> list[Tensor]:
        """Predicts.

        Args:
            canvas: [B, 1, 12, 12].

        Returns:
            K outputs, [B, outputs of the task] each.
        """
        features = self.trunk(canvas)
        return [head(features) for head in self.heads]
