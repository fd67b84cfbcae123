"""Every op again in plain PyTorch, written to be obviously right: the oracle, and what serves without the extension."""

from mtlfast.reference.elementwise import grad_drop, sign_purity, trimmed_mean
from mtlfast.reference.engine import (
    advance_,
    combine,
    excess_risks,
    flatten,
    gram,
    norms,
    project,
    scale_,
    unflatten,
)
from mtlfast.reference.group import Group
from mtlfast.reference.pcgrad import pcgrad
from mtlfast.reference.solve import DIMENSIONS, SOLVERS, Solver, solve

__all__ = [
    "DIMENSIONS",
    "SOLVERS",
    "Group",
    "Solver",
    "advance_",
    "combine",
    "excess_risks",
    "flatten",
    "grad_drop",
    "gram",
    "norms",
    "pcgrad",
    "project",
    "scale_",
    "sign_purity",
    "solve",
    "trimmed_mean",
    "unflatten",
]
