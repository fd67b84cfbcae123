"""The contestants of bench_jacobian.py: what follows the losses of one forward pass, by mtlfast and by others."""

from typing import Any
from unittest import mock

from contestant import Backward, Contestant, autogram
from step_ways import AT_ONCE, BARE, PLAIN, PYTORCH_PCGRAD, TORCHJD, Model, Passes, Sizes, rivals
from torch import Tensor

import mtlfast
from mtlfast.aggregation import PCGrad
from mtlfast.jacobian import _implicit

STORED, SEQUENTIAL, BATCHED, AUTO = "stored", "implicit, sequential", "implicit, batched", "auto"
AUTOGRAM = "TorchJD autogram"  # G from a second forward pass, and one weighted backward pass
TOLERANCE = 1e-4  # of autogram's G


def ways(num_tasks: int, size: Sizes, passes: Passes) -> dict[str, Contestant]:
    """The contestants by name. TorchJD's engine hooks into its modules, and so has a model of its own.

    Args:
        num_tasks: K.
        size: of the model and of a batch.
        passes: where forward passes are counted.
    """
    model, hooked = Model(num_tasks, size, passes), Model(num_tasks, size, passes)
    others = rivals(model)
    backwards: dict[str, Backward] = {
        PLAIN: others[PLAIN],
        BARE: others[BARE],
        STORED: _surgery(model, "stored"),
        SEQUENTIAL: _one_task_after_the_other(_surgery(model, "implicit")),
        BATCHED: _surgery(model, "implicit"),
        AUTO: _surgery(model, "auto"),
        TORCHJD: others[TORCHJD],
        TORCHJD + AT_ONCE: others[TORCHJD + AT_ONCE],
        PYTORCH_PCGRAD: others[PYTORCH_PCGRAD],
    }
    contestants = {name: Contestant(model, backward, model.losses) for name, backward in backwards.items()}
    return contestants | {AUTOGRAM: Contestant(hooked, autogram(hooked, "PCGradWeighting", None), hooked.losses)}


def why_without_autogram(contestants: dict[str, Contestant]) -> str:
    """Why TorchJD's engine cannot take part: it fails on the model, or its G is another. "" if it can."""
    return why_refused(contestants[AUTOGRAM], contestants[STORED].step().gram)


def why_refused(engine: Contestant, gram: Tensor, tolerance: float = TOLERANCE) -> str:
    """The same for a contestant whose step returns G, beside the G that is right."""
    try:
        theirs = engine.step()
    except Exception as error:  # whichever it is
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    scale = gram.diagonal().sqrt()
    apart = ((theirs - gram) / scale / scale[:, None]).abs().max().item()
    return "" if apart < tolerance else f"its G is {apart:.1g} of sqrt(G_ii G_jj) away from mtlfast's"


def _surgery(model: Model, jacobian: str) -> Backward:
    aggregator, trunk = PCGrad(), model.trunk
    return lambda features, losses: mtlfast.backward(losses, aggregator, shared=trunk, jacobian=jacobian)


def _one_task_after_the_other(backward: Backward) -> Backward:
    """The same without batched passes, which the implicit way takes wherever it can."""

    def run(features: Tensor, losses: list[Tensor]) -> Any:
        with mock.patch.object(_implicit, "why_not", _asked):
            return backward(features, losses)

    return run


def _asked(*_: Any) -> str:
    return "the benchmark asks for one pass after the other"
