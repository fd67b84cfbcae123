"""Aggregators: task gradients in, one update direction out.

Fixed and random weights: Sum, Mean, Constant, Random. Projections: PCGrad, GradVac, UPGrad, DualProj. Shortest and
constrained directions: MGDA, CAGrad, PCD. Outliers left out: Krum. Two batches: MoDo, SDMGrad. Around another: CRMOGM.
"""

from mtlfast.aggregation._base import Aggregator, GramAggregator
from mtlfast.aggregation._cagrad import CAGrad
from mtlfast.aggregation._crmogm import CRMOGM
from mtlfast.aggregation._dual_cone import DualProj, UPGrad
from mtlfast.aggregation._fixed import Constant, Mean, Sum
from mtlfast.aggregation._gradvac import GradVac
from mtlfast.aggregation._krum import Krum
from mtlfast.aggregation._mgda import MGDA
from mtlfast.aggregation._pcd import PCD
from mtlfast.aggregation._pcgrad import PCGrad
from mtlfast.aggregation._random import Random
from mtlfast.aggregation._two_batches import MoDo, SDMGrad

__all__ = [
    "CRMOGM",
    "MGDA",
    "PCD",
    "Aggregator",
    "CAGrad",
    "Constant",
    "DualProj",
    "GradVac",
    "GramAggregator",
    "Krum",
    "Mean",
    "MoDo",
    "PCGrad",
    "Random",
    "SDMGrad",
    "Sum",
    "UPGrad",
]
