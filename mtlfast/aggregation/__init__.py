"""Aggregators: task gradients in, one update direction out; `python -m mtlfast methods` prints what is here."""

from mtlfast.aggregation._aligned_mtl import AlignedMTL
from mtlfast.aggregation._base import Aggregator, GramAggregator
from mtlfast.aggregation._cagrad import CAGrad
from mtlfast.aggregation._compose import Compose
from mtlfast.aggregation._conflict_free import ConFIG
from mtlfast.aggregation._crmogm import CRMOGM
from mtlfast.aggregation._dual_cone import DualProj, UPGrad
from mtlfast.aggregation._fairgrad import FairGrad
from mtlfast.aggregation._fixed import Constant, Mean, Sum
from mtlfast.aggregation._gradvac import GradVac
from mtlfast.aggregation._imtlg import IMTLG
from mtlfast.aggregation._jacobian import AsksJacobian, Part, RowsJacobian
from mtlfast.aggregation._krum import Krum
from mtlfast.aggregation._mgda import MGDA
from mtlfast.aggregation._nash_mtl import NashMTL
from mtlfast.aggregation._norm_balance import ClipNorm, CrossNorm, InverseNorm, NormBalance
from mtlfast.aggregation._pcd import PCD
from mtlfast.aggregation._pcgrad import PCGrad
from mtlfast.aggregation._random import Random
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step
from mtlfast.aggregation._two_batches import MoDo, SDMGrad

# The table of contents: family -> its aggregators, and what each makes of the gradients.
FAMILIES: dict[str, dict[type[Aggregator], str]] = {
    "fixed weights": {
        Sum: "what sum(losses).backward() gives",
        Mean: "the same over K",
        Constant: "weights that the user fixes",
        Random: "weights drawn at each step",
    },
    "projection": {
        PCGrad: "each gradient off those that it conflicts with",
        GradVac: "each gradient towards its usual angle to the others",
        UPGrad: "each gradient onto the cone that no task minds",
        DualProj: "the mean gradient onto that cone",
    },
    "constrained": {
        MGDA: "the shortest convex combination",
        CAGrad: "the best for the worst task near the mean gradient",
        PCD: "the first task's, as far as the others' progress allows",
    },
    "fair progress": {
        IMTLG: "the same projection on every gradient",
        ConFIG: "the same angle to every gradient",
        NashMTL: "the bargaining solution",
        FairGrad: "alpha-fair shares",
    },
    "spectrum": {
        AlignedMTL: "equal singular values",
    },
    "norm balancing": {
        NormBalance: "every gradient at one length",
        ClipNorm: "no gradient longer than a length",
        CrossNorm: "of two, each at the other's length",
        InverseNorm: "weights inverse to the norms",
    },
    "outliers": {
        Krum: "the gradients closest to their neighbours",
    },
    "two batches": {
        MoDo: "a projected gradient step of the weights",
        SDMGrad: "the same, regularised towards a preference",
    },
    "wrapper": {
        CRMOGM: "its weights, smoothed",
        Compose: "balancing, then surgery",
    },
}

__all__ = [
    "CRMOGM",
    "FAMILIES",
    "IMTLG",
    "MGDA",
    "PCD",
    "Aggregator",
    "AlignedMTL",
    "AsksJacobian",
    "CAGrad",
    "ClipNorm",
    "Compose",
    "ConFIG",
    "Constant",
    "CrossNorm",
    "DualProj",
    "FairGrad",
    "GradVac",
    "GramAggregator",
    "InverseNorm",
    "Krum",
    "Mean",
    "MoDo",
    "NashMTL",
    "NormBalance",
    "PCGrad",
    "Part",
    "Random",
    "Reads",
    "RowsJacobian",
    "SDMGrad",
    "Step",
    "Sum",
    "UPGrad",
]
