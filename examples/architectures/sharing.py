"""What all architectures have in common: outputs for K tasks, and a list of which tasks share what."""

from __future__ import annotations

from torch import Tensor, nn


class MultiTaskNetwork(nn.Module):
    """A network that predicts for K tasks. An architecture defines `forward` and `sharing`."""

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Predicts.

        Args:
            inputs: [B, inputs].

        Returns:
            K outputs, [B, outputs of the task] each.
        """
        raise NotImplementedError

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """Says which tasks use which parameters.

        Returns:
            name of a module -> the tasks whose losses reach its parameters, in ascending order. Each parameter of the
            network is in exactly one of these modules.
        """
        raise NotImplementedError

    def shared(self) -> dict[str, nn.Parameter]:
        """The parameters that more than one task uses: `shared=` of `mtlfast.backward`.

        The others belong to one task each and need no surgery. `mtlfast.backward` gives them their plain gradients.
        """
        several = tuple(f"{name}." for name, tasks in self.sharing().items() if len(tasks) > 1)
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(several)}

    def groups(self) -> dict[str, list[str]]:
        """The shared modules by the tasks that use them: `groups=` of `mtlfast.backward`, for a surgery in each group.

        Returns:
            name of a group, such as "tasks 0, 2" -> the names of its modules.
        """
        groups: dict[str, list[str]] = {}
        for name, tasks in self.sharing().items():
            if len(tasks) > 1:
                groups.setdefault(f"tasks {', '.join(map(str, tasks))}", []).append(name)
        return groups
