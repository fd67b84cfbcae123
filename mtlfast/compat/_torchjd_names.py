"""The aggregators and weightings of torchjd.aggregation that mtlfast has, with TorchJD's constructors.

They are written out, not made from a list, so that type checkers and editors know them. The tests in
tests/peers/test_torchjd_names.py compare their names and arguments with those of an installed TorchJD.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtlfast import aggregation
from mtlfast._vectors import vector
from mtlfast.compat._torchjd_faces import (
    GramianWeighted,
    MatrixWeighting,
    OfMatrix,
    Projecting,
    Weighted,
    Weighting,
    joining,
    refuse_parts,
)


@joining
class Sum(Weighted, aggregation.Sum):
    """mtlfast's Sum."""


@joining
class Mean(Weighted, aggregation.Mean):
    """mtlfast's Mean."""


@joining
class Random(Weighted, aggregation.Random):
    """mtlfast's Random."""


@joining
class Constant(Weighted, aggregation.Constant):
    """mtlfast's Constant."""


@joining
class PCGrad(GramianWeighted, aggregation.PCGrad):
    """mtlfast's PCGrad."""


@joining
class PCD(GramianWeighted, aggregation.PCD):
    """mtlfast's PCD."""


@joining
class Krum(GramianWeighted, aggregation.Krum):
    """mtlfast's Krum."""


@joining
class IMTLG(GramianWeighted, aggregation.IMTLG):
    """mtlfast's IMTLG."""


@joining
class AlignedMTL(GramianWeighted, aggregation.AlignedMTL):
    """mtlfast's AlignedMTL."""


@joining
class ConFIG(aggregation.ConFIG):
    """mtlfast's ConFIG.

    As in TorchJD, `weighting` computes the preferences, and the direction itself has no weights.
    """

    @property
    def weighting(self) -> Weighting:
        """The weighting that computes the preferences."""
        return SumWeighting() if self.pref_vector is None else ConstantWeighting(self.pref_vector)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_parts(self, name)
        super().__setattr__(name, value)


@joining
class UPGrad(Projecting, aggregation.UPGrad):
    """mtlfast's UPGrad with TorchJD's regularisation, which is relative to the Gramian's trace.

    It reads `projector.reg_eps`.
    """

    _of_trace = True

    def __init__(self, pref_vector: Tensor | None = None, projector: Any = None) -> None:
        self.projector = projector
        super().__init__(pref_vector, self.reg_eps)


@joining
class DualProj(Projecting, aggregation.DualProj):
    """mtlfast's DualProj with TorchJD's regularisation, as in `UPGrad`. It reads `projector.reg_eps`."""

    _of_trace = True

    def __init__(self, pref_vector: Tensor | None = None, projector: Any = None) -> None:
        self.projector = projector
        super().__init__(pref_vector, self.reg_eps)


@joining
class CAGrad(GramianWeighted, aggregation.CAGrad):
    """mtlfast's CAGrad."""

    def __init__(self, c: float, norm_eps: float = 1e-4, rescale: Literal[0, 1, 2] = 0) -> None:
        super().__init__(c, rescale, norm_eps)


@joining
class GradVac(GramianWeighted, aggregation.GradVac):
    """mtlfast's GradVac. It never divides by a norm of zero, so it keeps `eps` but does not use it."""

    def __init__(
        self,
        beta: float = 0.5,
        eps: float = 1e-8,
        order: Literal["random", "fixed"] = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(beta, order, generator)
        self.eps = eps


@joining
class MGDA(GramianWeighted, aggregation.MGDA):
    """mtlfast's MGDA with the steps of Frank and Wolfe's algorithm, as in TorchJD."""

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__(epsilon, max_iters)


@joining
class NashMTL(Weighted, aggregation.NashMTL):
    """mtlfast's NashMTL. It solves its equations exactly, so it keeps `optim_niter` but does not use it."""

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        super().__init__(n_tasks, max_norm, update_weights_every)
        self.optim_niter = optim_niter

    @property
    def weighting(self) -> nn.Module:
        """The module that computes the weights from a Jacobian [m, n]."""
        return self._part("weighting", lambda: OfMatrix(NashMTLWeighting.looking_at(self)))


@joining
class FairGrad(GramianWeighted, aggregation.FairGrad):
    """mtlfast's FairGrad. It solves its equations exactly, so it keeps `max_iters` but does not use it."""

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        super().__init__(alpha)
        self.max_iters = max_iters


class _CRMOGM(aggregation.CRMOGM):
    """mtlfast's CRMOGM of an aggregator, or of the aggregator of a weighting."""

    def __init__(
        self,
        weighting: Weighting | aggregation.GramAggregator,
        alpha: float = 0.9,
        initial_weights: Tensor | None = None,
    ) -> None:
        aggregator = weighting.aggregator if isinstance(weighting, Weighting) else weighting
        super().__init__(aggregator, alpha, initial_weights)


class _HasPreferences(Weighting):
    """A weighting whose preferences come from an inner weighting, as in TorchJD."""

    @property
    def weighting(self) -> Weighting:
        """The weighting that computes the preferences."""
        return MeanWeighting() if self.pref_vector is None else ConstantWeighting(self.pref_vector)


def _weighting(of: type[aggregation.GramAggregator], kind: type[Weighting] = Weighting) -> type[Weighting]:
    made = type(f"{of.__name__.lstrip('_')}Weighting", (kind,), {"of": of, "__doc__": kind.__doc__})
    if issubclass(of, Weighted):
        of.weighting_class = made
    return made


class ConstantWeighting(MatrixWeighting):
    """The weights that the user gave, for any matrix [m, ...]."""

    of = Constant

    @property
    def weights(self) -> Tensor:
        """The weights [m], float64."""
        assert isinstance(self.aggregator, Constant)
        return self.aggregator.task_weights

    @weights.setter
    def weights(self, value: Tensor) -> None:
        self.aggregator.task_weights = vector(self, "weights", value, size="m")


class MeanWeighting(MatrixWeighting):
    """Weights of 1 / m, for any matrix [m, ...]."""

    of = Mean

    def forward(self, matrix: Tensor, *, rtol: float | None = None) -> Tensor:
        """The weights [m] in the matrix's dtype."""
        if matrix.dim() > 0 and len(matrix) == 0:
            raise ValueError(f"MeanWeighting: matrix has shape {list(matrix.shape)}, expected at least one row")
        return super().forward(matrix, rtol=rtol)


Constant.weighting_class, Mean.weighting_class = ConstantWeighting, MeanWeighting
AlignedMTLWeighting = _weighting(AlignedMTL, _HasPreferences)
CAGradWeighting = _weighting(CAGrad)
CRMOGMWeighting = _weighting(_CRMOGM)
DualProjWeighting = _weighting(DualProj, _HasPreferences)
FairGradWeighting = _weighting(FairGrad)
GradVacWeighting = _weighting(GradVac)
IMTLGWeighting = _weighting(IMTLG)
KrumWeighting = _weighting(Krum)
MGDAWeighting = _weighting(MGDA)
MoDoWeighting = _weighting(aggregation.MoDo)
NashMTLWeighting = _weighting(NashMTL)
PCDWeighting = _weighting(PCD)
PCGradWeighting = _weighting(PCGrad)
RandomWeighting = _weighting(Random, MatrixWeighting)
SDMGradWeighting = _weighting(aggregation.SDMGrad)
SumWeighting = _weighting(Sum, MatrixWeighting)
UPGradWeighting = _weighting(UPGrad, _HasPreferences)

__all__ = [
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "CRMOGMWeighting",
    "ConFIG",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "FairGrad",
    "FairGradWeighting",
    "GradVac",
    "GradVacWeighting",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "MoDoWeighting",
    "NashMTL",
    "PCDWeighting",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "SDMGradWeighting",
    "Sum",
    "SumWeighting",
    "UPGrad",
    "UPGradWeighting",
]
