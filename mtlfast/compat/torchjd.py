"""TorchJD on mtlfast's kernels: `accelerate()` for an installed TorchJD, and this module's names for a new import."""

from __future__ import annotations

from collections import deque
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from mtlfast import ops
from mtlfast.compat import _torchjd_excess as jd_excess
from mtlfast.compat import _torchjd_weights as jd_weights
from mtlfast.compat._torchjd_elementwise import DIRECTION_OF, DirectionOf
from mtlfast.compat._torchjd_faces import Weighted, Weighting, is_hooked, rounded, unrounded
from mtlfast.compat._torchjd_names import *  # noqa: F403
from mtlfast.compat._torchjd_names import __all__ as _names
from mtlfast.ops._precision import product_rtol
from mtlfast.task_gradients import DTYPES, TaskGradients

VERSIONS = ("0.17", "0.18")
MOST_ROWS = 128  # a Jacobian with more rows is left to TorchJD
WITHIN = ("forward", "_combine")  # the methods that compute an aggregator's direction

_patched: list[tuple[Any, str, Any]] = []  # an object, the name of its attribute, and the attribute's original value

__all__ = ["accelerate", "restore", "status", *_names]


class accelerate:
    """Lets an installed TorchJD, version 0.17 or 0.18, run on mtlfast: `accelerate()`, or `with accelerate():`.

    It replaces what TorchJD runs when `jac_to_grad` is called after `backward` or `mtl_backward`, when an aggregator is
    called on a matrix, and when a weighting is called on a Gramian. These then run on mtlfast's kernels and solvers,
    with TorchJD's results, errors, hooks, states and random draws. `jac_to_grad` reads the `.jac` fields twice where
    they are and concatenates nothing, with and without `optimize_gramian_computation`.

    TorchJD itself still runs whatever mtlfast has no solver for. That is: methods that are not in
    `_torchjd_weights.WEIGHTS_OF` (docs/migrate.md names them), weightings and projectors of the user, aggregators with
    forward hooks on the Jacobian, aggregators whose `forward`, `_combine` or weightings were replaced, differentiable
    calls, more than 128 rows, and dtypes that mtlfast has no kernels for. The solvers take Gramians in float32 and
    float64 that are finite and positive semi-definite. All others and the zero matrix are left to TorchJD, so that
    errors and NaN stay the same. On a GPU this check waits for the Gramian once a call.

    Differences from TorchJD: solvers read the Gram matrix in float64, and the weighted sum takes their weights in
    float64, while hooks see both in the Jacobian's dtype. CAGrad and FairGrad are solved to the optimum, and FairGrad
    has MGDA's weights if its equations have no solution.
    IMTLG and ConFIG decide about the rank with unit gradients. TrimmedMean adds in float64. GradDrop is TorchJD's to
    the last bit, except where a purity and its random number agree to the last bits in a column that torch adds in
    another order.

    Several ranks: TorchJD's functions work on each rank's own gradients, with and without `accelerate()`. The replicas
    stay equal only if the user averages the resulting `.jac` or `.grad`.

    Raises:
        ImportError: TorchJD is not installed.
        RuntimeError: TorchJD has another version.
    """

    def __init__(self) -> None:
        """Turns it on. If it is on already, nothing changes."""
        self._mine = not _patched
        if self._mine:
            _patch()

    def __enter__(self) -> accelerate:
        return self

    def __exit__(self, *error: object) -> None:
        """Turns it off, unless it was on before."""
        if self._mine:
            restore()


def restore() -> None:
    """Turns `accelerate()` off and gives TorchJD its own functions back."""
    while _patched:
        owner, name, original = _patched.pop()
        setattr(owner, name, original)


def status() -> str:
    """TorchJD's version and whether `accelerate()` is on, in one line, which `python -m mtlfast info` prints."""
    try:
        version = metadata.version("torchjd")
    except metadata.PackageNotFoundError:
        return "not installed"
    if not version.startswith(VERSIONS):
        return f"{version}; accelerate() is for {' and '.join(VERSIONS)}"
    return f"{version}; accelerate() is {'on' if _patched else 'off'}"


def _patch() -> None:
    try:
        version = metadata.version("torchjd")
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"accelerate: there is no torchjd, expected one of {' and '.join(VERSIONS)} (pip install torchjd)"
        ) from None
    if not version.startswith(VERSIONS):
        raise RuntimeError(f"accelerate: torchjd is {version}, expected one of {' and '.join(VERSIONS)}")
    import torchjd.aggregation
    from torchjd._linalg import compute_gramian
    from torchjd.aggregation import _aggregator_bases, _weighting_bases
    from torchjd.autojac import _jac_to_grad

    for name, weights_of in jd_weights.WEIGHTS_OF.items():
        weighting = getattr(torchjd.aggregation, name)
        forward = _on_solver(weights_of, weighting.forward)
        forward.precision = "fast" if name in jd_weights.BY_FAST_SUMS else "exact"
        _replace(weighting, "forward", forward)
    whole = torchjd.aggregation.ConFIG
    _replace(whole, "forward", _without_a_pseudo_inverse(whole.forward))
    if (excess := getattr(torchjd.aggregation, "ExcessMTLWeighting", None)) is not None:
        _replace(excess, "forward", _on_excess_risks(excess.forward))
    for name, direction_of in DIRECTION_OF.items():
        aggregator = getattr(torchjd.aggregation, name)
        _replace(aggregator, "forward", _element_by_element(direction_of, aggregator.forward))
    composition = _weighting_bases._Composition
    _replace(composition, "forward", _gram_first(composition.forward, compute_gramian))
    weighted = _aggregator_bases.WeightedAggregator
    _replace(weighted, "_combine", staticmethod(_combine_rows(weighted._combine)))
    _replace(_jac_to_grad, "_jacobian_based", _without_a_matrix(_jac_to_grad))
    _replace(_jac_to_grad, "_gramian_based", _in_two_reads(_jac_to_grad._gramian_based))


def _replace(owner: Any, name: str, new: Any) -> None:
    _patched.append((owner, name, owner.__dict__[name]))
    setattr(owner, name, new)


def _ours(*tensors: Tensor) -> bool:
    """Whether mtlfast's kernels can take the tensors and no graph is needed."""
    first = tensors[0]
    return (
        first.dtype in DTYPES
        and 0 < len(first) <= MOST_ROWS
        and all(t.dtype == first.dtype and t.device == first.device for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _on_solver(weights_of: jd_weights.WeightsOf, original: Any) -> Any:
    def forward(self: Any, gramian: Tensor, /) -> Tensor:
        if gramian.dim() == 2 and _ours(gramian) and jd_weights.is_gramian(gramian):
            gram, rtol = unrounded(gramian)
            weights = weights_of(self, gram, gramian, jd_weights.rtol_of(gramian) if rtol is None else rtol)
            if weights is not None:
                return rounded(weights, gramian.dtype)
        result: Tensor = original(self, gramian)
        return result

    return forward


def _on_excess_risks(original: Any) -> Any:
    def forward(self: Any, matrix: Tensor, /) -> Tensor:
        if matrix.dim() == 2 and _ours(matrix) and jd_excess.serves(matrix):
            return jd_excess.weights(self, TaskGradients.from_matrix(matrix))
        result: Tensor = original(self, matrix)
        return result

    return forward


def _gram_for(weighting: Any, grads: TaskGradients) -> Tensor:
    """The Gram matrix in the gradients' dtype, as a Gramian weighting of TorchJD's or a face of one is to see it.

    Its sums overflow where TorchJD's do, to NaN where infinities meet.
    """
    face = isinstance(weighting, Weighting)
    precision = weighting.aggregator.reads.precision if face else getattr(type(weighting).forward, "precision", "fast")
    if precision == "exact" and grads.dtype == torch.float32:
        rtol = grads.num_tasks * product_rtol(grads, precision)
        gram = rounded(ops.gram(grads, precision=precision), grads.dtype, rtol)
        if face or bool(gram.isfinite().all()):  # host: the solver asks next, of the same matrix
            return gram
    return ops.gram(grads, precision="fast").to(grads.dtype)


def _gram_first(original: Any, compute_gramian: Any) -> Any:
    def forward(self: Any, stat: Tensor, /) -> Tensor:
        if self.fn is compute_gramian and stat.dim() == 2 and _ours(stat):
            result: Tensor = self.weighting(_gram_for(self.weighting, TaskGradients.from_matrix(stat)))
        else:
            result = original(self, stat)
        return result

    return forward


def _without_a_pseudo_inverse(original: Any) -> Any:
    def forward(self: Any, matrix: Tensor, /) -> Tensor:
        if matrix.dim() == 2 and _ours(matrix) and (vectors := _config(self, [matrix])) is not None:
            return vectors[0]
        result: Tensor = original(self, matrix)
        return result

    return forward


def _element_by_element(direction_of: DirectionOf, original: Any) -> Any:
    def forward(self: Any, matrix: Tensor, /) -> Tensor:
        if matrix.dim() == 2 and _ours(matrix):
            directions = direction_of(self, TaskGradients.from_matrix(matrix))
            if directions is not None and directions[0] is not None:
                return directions[0]
        result: Tensor = original(self, matrix)
        return result

    forward.direction_of = direction_of  # type: ignore[attr-defined]
    return forward


def _direction(aggregator: Any, jacobians: Any) -> list[Tensor] | None:
    """The directions of an element-wise aggregator, or None if TorchJD must compute them.

    Only in the first case it clears `jacobians`.
    """
    direction_of = getattr(type(aggregator).forward, "direction_of", None)
    if direction_of is None or not vars(aggregator).keys().isdisjoint(WITHIN):
        return None
    directions = direction_of(aggregator, TaskGradients.from_stacked(list(jacobians)))
    if directions is None:
        return None
    jacobians.clear()
    return [direction for direction in directions if direction is not None]


def _config(aggregator: Any, jacobians: Any) -> list[Tensor] | None:
    """ConFIG's directions, or None if TorchJD must compute them. Only in the first case it clears `jacobians`."""
    grads = TaskGradients.from_stacked(list(jacobians))
    weights = jd_weights.config(aggregator, ops.gram(grads), jacobians[0], grads.numel())
    if weights is None:
        return None
    jacobians.clear()
    return _combined(grads, weights)


def _combine_rows(original: Any) -> Any:
    def combine(matrix: Tensor, weights: Tensor) -> Tensor:
        if matrix.dim() == 2 and _ours(matrix, weights) and weights.shape == matrix.shape[:1]:
            (vector,) = ops.combine(TaskGradients.from_matrix(matrix), unrounded(weights)[0])
            assert vector is not None
            return vector
        result: Tensor = original(matrix, weights)
        return result

    return combine


def _without_a_matrix(module: Any) -> Any:
    """`_jacobian_based` of TorchJD's module, which does not concatenate the Jacobian unless something looks at it."""
    original = module._jacobian_based

    def jacobian_based(aggregator: Any, jacobians: deque[Tensor], tensors: Any) -> tuple[list[Tensor], Tensor | None]:
        from torchjd.aggregation import ConFIG

        if not _ours(*jacobians) or _is_watched(aggregator):
            pass
        elif module._can_skip_jacobian_combination(aggregator) and _is_as_made(aggregator):
            return weighted(aggregator, jacobians, tensors)
        elif jd_excess.is_as_made(aggregator) and jd_excess.serves(jacobians[0]):
            return excess(aggregator, jacobians, tensors)
        else:
            computed = _config if type(aggregator) is ConFIG else _direction
            if (directions := computed(aggregator, jacobians)) is not None:
                return _as_parameters(directions, tensors), None
        result: tuple[list[Tensor], Tensor | None] = original(aggregator, jacobians, tensors)
        return result

    def excess(aggregator: Any, jacobians: deque[Tensor], tensors: Any) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad():
            grads = TaskGradients.from_stacked(list(jacobians))
            weights = jd_excess.weights(aggregator.weighting, grads)
        jacobians.clear()
        return _as_parameters(_combined(grads, weights), tensors), weights

    def weighted(aggregator: Any, jacobians: deque[Tensor], tensors: Any) -> tuple[list[Tensor], Tensor]:
        from torchjd.aggregation._mixins import _NonDifferentiable

        with torch.set_grad_enabled(torch.is_grad_enabled() and not isinstance(aggregator, _NonDifferentiable)):
            grads, weights = _weigh(aggregator, jacobians)
            if not _fits(weights, grads):
                vector = aggregator._combine(module._unite_jacobians(jacobians), weights)
                return module._disunite_gradient(vector, tensors), weights
        jacobians.clear()  # the caller's list: the Jacobians are freed before gradients are added to .grad
        return _as_parameters(_combined(grads, unrounded(weights)[0]), tensors), weights

    return jacobian_based


def _in_two_reads(original: Any) -> Any:
    """`_gramian_based` of TorchJD's module, which reads the Jacobians twice and copies nothing."""

    def gramian_based(aggregator: Any, jacobians: deque[Tensor]) -> tuple[list[Tensor], Tensor]:
        if not _ours(*jacobians):
            result: tuple[list[Tensor], Tensor] = original(aggregator, jacobians)
            return result
        grads, weights = _weigh(aggregator, jacobians)
        if not _fits(weights, grads):
            return [torch.tensordot(weights.to(dtype=j.dtype), j, dims=1) for j in jacobians], weights
        jacobians.clear()
        return _combined(grads, unrounded(weights)[0]), weights

    return gramian_based


def _is_watched(aggregator: Any) -> bool:
    """Whether hooks on the aggregator, or on all modules, would have to see the Jacobian matrix."""
    everywhere = nn.modules.module
    return bool(is_hooked(aggregator) or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def _is_as_made(aggregator: Any) -> bool:
    """Whether the direction is w(J J^T)^T J with the weights of `gramian_weighting`, because nothing was replaced."""
    from torchjd._linalg import compute_gramian
    from torchjd.aggregation import WeightedAggregator
    from torchjd.aggregation._weighting_bases import _Composition

    own = (getattr(type(aggregator), name) is getattr(WeightedAggregator, name) for name in ("__call__", *WITHIN))
    if isinstance(aggregator, Weighted):  # a face
        return not any(vars(type(aggregator)).get(name) for name in WITHIN)
    weighting = aggregator.weighting
    return (
        all(own)
        and vars(aggregator).keys().isdisjoint(WITHIN)
        and type(weighting) is _Composition
        and weighting.fn is compute_gramian
        and weighting.weighting is aggregator.gramian_weighting
    )


def _weigh(aggregator: Any, jacobians: Any) -> tuple[TaskGradients, Tensor]:
    """The task gradients, and the weights of the aggregator's `gramian_weighting` for G in the Jacobian's dtype."""
    grads = TaskGradients.from_stacked(list(jacobians))
    weighting = aggregator.gramian_weighting
    return grads, weighting(_gram_for(weighting, grads))


def _fits(weights: Tensor, grads: TaskGradients) -> bool:
    """Whether there is one weight for each row, in the rows' dtype and without a graph. Hooks may return others."""
    alike = (weights.dtype, weights.device, weights.shape) == (grads.dtype, grads.device, (grads.num_tasks,))
    return alike and not (weights.requires_grad and torch.is_grad_enabled())


def _combined(grads: TaskGradients, weights: Tensor) -> list[Tensor]:
    with torch.no_grad():
        directions = ops.combine(grads, weights)
    return [direction for direction in directions if direction is not None]


def _as_parameters(directions: list[Tensor], tensors: Any) -> list[Tensor]:
    """The directions in the shapes and dtypes of the parameters."""
    return [direction.reshape(t.shape).to(t.dtype) for direction, t in zip(directions, tensors, strict=True)]
