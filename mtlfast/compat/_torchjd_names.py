"""The names of torchjd.aggregation that mtlfast has, with TorchJD's constructors.

They are written out, not made from a list, so that type checkers and editors know them.
tests/peers/test_torchjd_names.py compares them and their arguments with an installed TorchJD's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtlfast import aggregation
from mtlfast.aggregation import (
    IMTLG,
    PCD,
    AlignedMTL,
    ConFIG,
    Constant,
    Krum,
    Mean,
    PCGrad,
    Random,
    Sum,
)


def _regularisation(projector: Any) -> float:
    """`reg_eps` of a TorchJD projector, or its default."""
    if projector is not None and not hasattr(projector, "reg_eps"):
        raise ValueError(f"projector is a {type(projector).__name__}, expected one with reg_eps (a QuadprogProjector)")
    return 1e-4 if projector is None else float(projector.reg_eps)


class UPGrad(aggregation.UPGrad):
    """mtlfast's UPGrad, regularised relative to the Gramian's trace as TorchJD's; of `projector` it reads `reg_eps`."""

    _of_trace = True

    def __init__(self, pref_vector: Tensor | None = None, projector: Any = None) -> None:
        """TorchJD's arguments."""
        super().__init__(pref_vector, _regularisation(projector))


class DualProj(aggregation.DualProj):
    """mtlfast's DualProj, regularised as TorchJD's; of `projector` it reads `reg_eps`."""

    _of_trace = True

    def __init__(self, pref_vector: Tensor | None = None, projector: Any = None) -> None:
        """TorchJD's arguments."""
        super().__init__(pref_vector, _regularisation(projector))


class CAGrad(aggregation.CAGrad):
    """mtlfast's CAGrad."""

    def __init__(self, c: float, norm_eps: float = 1e-4, rescale: Literal[0, 1, 2] = 0) -> None:
        """TorchJD's arguments, then mtlfast's own."""
        super().__init__(c, rescale, norm_eps)


class GradVac(aggregation.GradVac):
    """mtlfast's GradVac, which divides by no norm of zero and needs no `eps`."""

    def __init__(
        self,
        beta: float = 0.5,
        eps: float = 1e-8,
        order: Literal["random", "fixed"] = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        """TorchJD's arguments, then mtlfast's own."""
        super().__init__(beta, order, generator)


class MGDA(aggregation.MGDA):
    """mtlfast's MGDA by Frank and Wolfe's steps, as TorchJD's."""

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        """TorchJD's arguments."""
        super().__init__(epsilon, max_iters)


class NashMTL(aggregation.NashMTL):
    """mtlfast's NashMTL, which is exact and needs no `optim_niter`."""

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        """TorchJD's arguments."""
        super().__init__(n_tasks, max_norm, update_weights_every)


class FairGrad(aggregation.FairGrad):
    """mtlfast's FairGrad, which is exact and needs no `max_iters`."""

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        """TorchJD's arguments."""
        super().__init__(alpha)


class _Weighting(nn.Module):
    """The weights of an aggregator for a Gramian [m, m]."""

    of: type[aggregation.GramAggregator]

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__()
        self.aggregator = self.of(*arguments, **settings)

    def forward(self, gramian: Tensor) -> Tensor:
        """[m], in the Gramian's dtype."""
        return self.aggregator.weights(gramian.double()).to(gramian.dtype)

    def reset(self) -> None:
        """Forgets the state."""
        self.aggregator.reset()


class _CRMOGM(aggregation.CRMOGM):
    """mtlfast's CRMOGM of a weighting's aggregator, or of an aggregator."""

    def __init__(
        self,
        weighting: _Weighting | aggregation.GramAggregator,
        alpha: float = 0.9,
        initial_weights: Tensor | None = None,
    ) -> None:
        """TorchJD's arguments."""
        aggregator = weighting.aggregator if isinstance(weighting, _Weighting) else weighting
        super().__init__(aggregator, alpha, initial_weights)


def _weighting(of: type[aggregation.GramAggregator]) -> type[_Weighting]:
    return type(f"{of.__name__.lstrip('_')}Weighting", (_Weighting,), {"of": of, "__doc__": _Weighting.__doc__})


AlignedMTLWeighting = _weighting(AlignedMTL)
CAGradWeighting = _weighting(CAGrad)
ConstantWeighting = _weighting(Constant)
CRMOGMWeighting = _weighting(_CRMOGM)
DualProjWeighting = _weighting(DualProj)
FairGradWeighting = _weighting(FairGrad)
GradVacWeighting = _weighting(GradVac)
IMTLGWeighting = _weighting(IMTLG)
KrumWeighting = _weighting(Krum)
MeanWeighting = _weighting(Mean)
MGDAWeighting = _weighting(MGDA)
MoDoWeighting = _weighting(aggregation.MoDo)
PCDWeighting = _weighting(PCD)
PCGradWeighting = _weighting(PCGrad)
RandomWeighting = _weighting(Random)
SDMGradWeighting = _weighting(aggregation.SDMGrad)
SumWeighting = _weighting(Sum)
UPGradWeighting = _weighting(UPGrad)

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
