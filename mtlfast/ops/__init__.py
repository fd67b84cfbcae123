"""The ops: each checks its arguments, then calls the compiled kernel or the plain-PyTorch reference."""

from mtlfast.ops.advance import advance_
from mtlfast.ops.combine import combine
from mtlfast.ops.excess_risks import excess_risks
from mtlfast.ops.flatten import flatten, unflatten
from mtlfast.ops.grad_drop import grad_drop, sign_purity
from mtlfast.ops.gram import gram, norms
from mtlfast.ops.project import project
from mtlfast.ops.scale import scale_
from mtlfast.ops.solve import solve
from mtlfast.ops.trimmed_mean import trimmed_mean

__all__ = [
    "advance_",
    "combine",
    "excess_risks",
    "flatten",
    "grad_drop",
    "gram",
    "norms",
    "project",
    "scale_",
    "sign_purity",
    "solve",
    "trimmed_mean",
    "unflatten",
]
