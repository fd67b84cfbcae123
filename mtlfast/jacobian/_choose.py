"""Chooses the way to compute the Jacobian from the arguments of `mtlfast.backward`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mtlfast._arguments import Columns, Shared, found_parameters, refuse_both, reusable, shared_parameters
from mtlfast._losses import Losses, Present, present_losses
from mtlfast.jacobian._accumulated import TaskGradientAccumulator
from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._closures import ClosuresJacobian
from mtlfast.jacobian._features import Features, FeaturesJacobian, named_features
from mtlfast.jacobian._graph import reached_by
from mtlfast.jacobian._implicit import ImplicitJacobian
from mtlfast.jacobian._mixing import MixingJacobian
from mtlfast.jacobian._plan import OverBudget
from mtlfast.jacobian._probe import NotMixed
from mtlfast.jacobian._rows import StoredRows
from mtlfast.jacobian._samples import samples_of
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
    way: str | None = "stored",
    memory_budget: int | None = None,
    mixing: Tensor | None = None,
) -> Jacobian:
    """The Jacobian for these arguments, which are those of `mtlfast.backward`; `way` is its `jacobian`.

    Raises:
        ValueError, TypeError: an argument does not fit, or two of them exclude each other.
    """
    given = {"shared": shared, "features": features, "at": at, "storage_dtype": storage_dtype, "second": second}
    later = weighting is not None and weighting.reads_norms
    _check_way(way, memory_budget)
    why_not_mixed, mixed = "", None
    if mixing is not None:
        refuse_both("mixing", given, ("features", "at", "second"))
        per_sample, samples = samples_of(mixing, losses)
        losses = list(samples.losses(per_sample).unbind())
        if way in ("auto", "mixing"):
            shared = None if shared is None else reusable(shared)
            mixed = partial(
                MixingJacobian,
                present_losses(losses),
                None if shared is None else shared_parameters(shared),
                retain_graph,
                later,
                storage_dtype,
                per_sample,
                samples,
                memory_budget=memory_budget,
            )
            try:
                return mixed(way=way)
            except NotMixed as error:
                if way == "mixing":
                    raise ValueError(f'backward: jacobian is "mixing", but {error}') from None
                why_not_mixed, way = str(error), "auto"
    elif way == "mixing":
        raise ValueError('backward: jacobian is "mixing", expected mixing= beside it')
    asked = 'jacobian="implicit"' if way == "implicit" else None if memory_budget is None else "memory_budget="
    if asked is not None:
        kind = "an accumulator" if isinstance(losses, TaskGradientAccumulator) else None
        for name in ("at", "second"):
            kind = name if given[name] is not None else kind
        if kind is not None:
            raise ValueError(f"backward: got {asked} beside {kind}, expected losses of one forward pass")
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
    if way is None:
        on_cpu = all(loss.device.type == "cpu" for loss in present.losses)
        way = "auto" if on_cpu and storage_dtype is None else "stored"
    if at is not None:
        return FeaturesJacobian(present, named_features(at, "at"), retain_graph, later)
    columns: Columns | None
    if features is not None:
        behind = reached_by(named_features(features, "features").parameters)
        behind.check_told_apart("backward")
        columns = found_parameters(behind.leaves)
    else:
        columns = None if shared is None else shared_parameters(shared)
    if present.closures and asked is not None:
        raise ValueError(f"backward: got {asked} beside closures, expected losses of one forward pass")
    if present.closures:
        later = weighting is not None  # the losses are known after the passes
    if second is None and not present.closures and way != "stored":
        try:
            return ImplicitJacobian(
                present, columns, retain_graph, later, storage_dtype, way, memory_budget, why_not_mixed
            )
        except OverBudget as error:
            if mixed is None:
                raise
            try:
                return mixed(way="mixing")  # K passes are over the budget, and so one pass need not take fewer FLOPs
            except NotMixed as why:
                raise ValueError(f"{error}; not mixed, because {why}") from None
    if second is None:
        return _rows(present, columns, retain_graph, later, storage_dtype)
    if isinstance(second, TaskGradientAccumulator):
        raise TypeError("backward: second is a TaskGradientAccumulator, expected losses or closures as losses")
    other = present_losses(second, what="second loss", may_be_closures=True)
    if columns is None:  # each head is reached by two losses of one task
        columns = _shared_in_one_batch(present)
    return TwoBatchesJacobian(_rows(both(present, other), columns, retain_graph, True, storage_dtype), present)


def _check_way(way: str | None, memory_budget: int | None) -> None:
    """Raises unless the arguments `jacobian` and `memory_budget` of `mtlfast.backward` fit."""
    if way not in (None, "stored", "implicit", "auto", "mixing"):
        raise ValueError(f"backward: jacobian is {way!r}, expected 'stored', 'implicit', 'auto' or 'mixing'")
    if memory_budget is None:
        return
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 1:
        raise ValueError(f"backward: memory_budget is {memory_budget!r}, expected a number of bytes above 0, or None")
    if way == "stored":
        raise ValueError(
            "backward: got memory_budget= beside jacobian='stored', expected 'implicit', 'auto' or 'mixing'"
        )


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
    reached = reached_by(present.losses)
    reached.check_told_apart("backward")
    return found_parameters(reached.several)
