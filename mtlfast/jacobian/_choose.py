"""Chooses the way to compute the Jacobian from the arguments of `mtlfast.backward`."""

from __future__ import annotations

import torch

from mtlfast._arguments import Shared, found_parameters, refuse_both, shared_parameters
from mtlfast._losses import Losses, present_losses
from mtlfast.jacobian._accumulated import TaskGradientAccumulator
from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._closures import ClosuresJacobian
from mtlfast.jacobian._features import Features, FeaturesJacobian, named_features
from mtlfast.jacobian._graph import reached_by
from mtlfast.jacobian._stored import StoredJacobian
from mtlfast.weighting import LossWeighting


def jacobian_of(
    losses: Losses | TaskGradientAccumulator,
    shared: Shared | None,
    features: Features | None,
    at: Features | None,
    retain_graph: bool,
    weighting: LossWeighting | None,
    storage_dtype: torch.dtype | None,
) -> Jacobian:
    """The Jacobian for these arguments, which are those of `mtlfast.backward`.

    Raises:
        ValueError, TypeError: an argument does not fit, or two of them exclude each other.
    """
    later = weighting is not None and weighting.reads_norms
    given = {"shared": shared, "features": features, "at": at, "storage_dtype": storage_dtype}
    if isinstance(losses, TaskGradientAccumulator):
        refuse_both("an accumulator", {**given, "retain_graph": retain_graph or None}, (*given, "retain_graph"))
        return losses.jacobian(later)
    present = present_losses(losses, may_be_closures=True)
    if at is not None:
        refuse_both("at", given, ("shared", "features", "storage_dtype"))
    if features is not None:
        refuse_both("features", given, ("shared",))
    if present.closures:
        refuse_both("closures", given, ("features", "at"))
        columns = None if shared is None else shared_parameters(shared)
        return ClosuresJacobian(present, columns, retain_graph, weighting is not None, storage_dtype)
    if at is not None:
        return FeaturesJacobian(present, named_features(at, "at"), retain_graph, later)
    if features is not None:
        columns = found_parameters(reached_by(named_features(features, "features").parameters).leaves)
    else:
        columns = None if shared is None else shared_parameters(shared)
    return StoredJacobian(present, columns, retain_graph, later, storage_dtype=storage_dtype)
