"""Chooses the way to compute the Jacobian from the arguments of `mtlfast.backward`."""

from __future__ import annotations

import torch

from mtlfast._arguments import Columns, Shared, found_parameters, refuse_both, shared_parameters
from mtlfast._losses import Losses, Present, present_losses
from mtlfast.jacobian._accumulated import TaskGradientAccumulator
from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._closures import ClosuresJacobian
from mtlfast.jacobian._features import Features, FeaturesJacobian, named_features
from mtlfast.jacobian._graph import reached_by
from mtlfast.jacobian._rows import StoredRows
from mtlfast.jacobian._stored import StoredJacobian
from mtlfast.jacobian._two_batches import TwoBatchesJacobian, both
from mtlfast.weighting import LossWeighting


def jacobian_of(
    losses: Losses | TaskGradientAccumulator,
    shared: Shared | None,
    features: Features | None,
    at: Features | None,
    retain_graph: bool,
    weighting: LossWeighting | None,
    second: Losses | None,
    storage_dtype: torch.dtype | None,
) -> Jacobian:
    """The Jacobian for these arguments, which are those of `mtlfast.backward`.

    Raises:
        ValueError, TypeError: an argument does not fit, or two of them exclude each other.
    """
    given = {"shared": shared, "features": features, "at": at, "storage_dtype": storage_dtype, "second": second}
    later = weighting is not None and weighting.reads_norms
    if isinstance(losses, TaskGradientAccumulator):
        refuse_both("an accumulator", {**given, "retain_graph": retain_graph or None}, (*given, "retain_graph"))
        return losses.jacobian(later)
    present = present_losses(losses, may_be_closures=True)
    if at is not None:
        refuse_both("at", given, ("shared", "features", "storage_dtype"))
        if second is not None:
            raise ValueError(
                "backward: got second= beside at=, expected shared= or features=, as each batch has features of its own"
            )
    if features is not None:
        refuse_both("features", given, ("shared",))
    if present.closures:
        refuse_both("closures", given, ("features", "at"))
    if at is not None:
        return FeaturesJacobian(present, named_features(at, "at"), retain_graph, later)
    columns: Columns | None
    if features is not None:
        columns = found_parameters(reached_by(named_features(features, "features").parameters).leaves)
    else:
        columns = None if shared is None else shared_parameters(shared)
    if present.closures:
        later = weighting is not None  # the losses are known after the passes
    if second is None:
        return _rows(present, columns, retain_graph, later, storage_dtype)
    if isinstance(second, TaskGradientAccumulator):
        raise TypeError("backward: second is a TaskGradientAccumulator, expected losses or closures as losses")
    other = present_losses(second, what="second loss", may_be_closures=True)
    if columns is None:  # each head is reached by two losses of one task
        columns = _shared_in_one_batch(present)
    return TwoBatchesJacobian(_rows(both(present, other), columns, retain_graph, True, storage_dtype), present)


def _rows(
    present: Present,
    columns: Columns | None,
    retain_graph: bool,
    later: bool,
    storage_dtype: torch.dtype | None,
) -> StoredRows:
    """A Jacobian that holds its rows; `later` is whether loss weights come after the backward passes."""
    if present.closures:
        return ClosuresJacobian(present, columns, retain_graph, later, storage_dtype)
    return StoredJacobian(present, columns, retain_graph, later, storage_dtype=storage_dtype)


def _shared_in_one_batch(present: Present) -> Columns:
    """The parameters that more than one loss of this batch reaches."""
    if present.closures:
        raise ValueError("backward: shared is None, expected the shared parameters beside closures and second=")
    return found_parameters(reached_by(present.losses).several)
