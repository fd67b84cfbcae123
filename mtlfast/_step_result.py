"""What one surgery step tells about itself."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """The tensors of one step, on the gradients' device: reading one on the host waits for it.

    Attributes:
        losses: [K] the present tasks' losses as they were given, so times `loss_scale`; detached.
        tasks: the K present tasks' indices.
        weights: [K] float64, the tasks' weights; None for an aggregator that has none.
        loss_weights: [K] what the weighting multiplied each loss by before its backward pass; None without a weighting.
        gram: [K, K] float64; None unless the method computed it or `diagnostics=True` asked for it.
        plan: how the task gradients were made: "stored" is one backward pass a task, all gradients held at once.
    """

    losses: Tensor
    tasks: tuple[int, ...]
    weights: Tensor | None
    gram: Tensor | None
    loss_weights: Tensor | None = None
    plan: str = "stored"

    @property
    def norms(self) -> Tensor | None:
        """[K] float64, the norms of the task gradients; None without `gram`."""
        return None if self.gram is None else self.gram.diagonal().sqrt()

    @property
    def cosines(self) -> Tensor | None:
        """[K, K] float64, the cosines between task gradients (NaN for a zero gradient); None without `gram`."""
        norms = self.norms
        return None if self.gram is None or norms is None else self.gram / norms.outer(norms)
