"""Aggregators, which make one update direction of the task gradients. `python -m mtlfast methods` prints them all."""

from mtlfast.aggregation._aligned_mtl import AlignedMTL
from mtlfast.aggregation._base import Aggregator
from mtlfast.aggregation._bloop import Bloop
from mtlfast.aggregation._cagrad import CAGrad
from mtlfast.aggregation._compose import Compose
from mtlfast.aggregation._conflict_free import ConFIG
from mtlfast.aggregation._crmogm import CRMOGM
from mtlfast.aggregation._db_mtl import DBMTL
from mtlfast.aggregation._dual_cone import DualProj, UPGrad
from mtlfast.aggregation._excess_mtl import ExcessMTL
from mtlfast.aggregation._fairgrad import FairGrad
from mtlfast.aggregation._fixed import Constant, Mean, Sum
from mtlfast.aggregation._grad_drop import GradDrop
from mtlfast.aggregation._gradvac import GradVac
from mtlfast.aggregation._gram_aggregator import GramAggregator
from mtlfast.aggregation._groups import Groups
from mtlfast.aggregation._imtlg import IMTLG
from mtlfast.aggregation._jacobian import AsksJacobian, Products, RowsJacobian, do_nothing
from mtlfast.aggregation._krum import Krum
from mtlfast.aggregation._meta_balance import MetaBalance
from mtlfast.aggregation._mgda import MGDA
from mtlfast.aggregation._moco import MoCo
from mtlfast.aggregation._nash_mtl import NashMTL
from mtlfast.aggregation._norm_balance import ClipNorm, CrossNorm, InverseNorm, NormBalance
from mtlfast.aggregation._parts import AsksPart, Part, parts_of
from mtlfast.aggregation._pcd import PCD
from mtlfast.aggregation._pcgrad import PCGrad
from mtlfast.aggregation._pseudo_momentum import PseudoMomentum
from mtlfast.aggregation._random import Random
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step
from mtlfast.aggregation._trimmed_mean import Median, TrimmedMean
from mtlfast.aggregation._two_batches import MoDo, SDMGrad

# The table of contents: each family's aggregators, and what each makes of the task gradients.
FAMILIES: dict[str, dict[type[Aggregator], str]] = {
    "fixed weights": {
        Sum: "what sum(losses).backward() gives",
        Mean: "the same over K",
        Constant: "weights that the user fixes",
        Random: "weights drawn at each step",
    },
    "projection": {
        PCGrad: "each gradient without its conflicts with the others",
        GradVac: "each gradient turned to its usual angle to the others",
        UPGrad: "the mean of the gradients, each projected so that no task gets worse",
        DualProj: "the mean gradient projected so that no task gets worse",
    },
    "constrained": {
        MGDA: "the shortest convex combination",
        CAGrad: "near the mean gradient, the best for the worst task",
        PCD: "the first task's gradient, if the others still progress",
    },
    "fair progress": {
        IMTLG: "a direction with one projection on every gradient",
        ConFIG: "a direction at one angle to every gradient",
        NashMTL: "the bargaining solution",
        FairGrad: "alpha-fair shares of the progress",
    },
    "spectrum": {
        AlignedMTL: "gradients with equal singular values",
    },
    "norm balancing": {
        NormBalance: "every gradient scaled to one length",
        ClipNorm: "gradients clipped to a length",
        CrossNorm: "two gradients, each scaled to the other's length",
        InverseNorm: "weights inverse to the norms",
        MetaBalance: "auxiliary gradients brought nearer to the main one's average length",
    },
    "outliers": {
        Krum: "the mean of the gradients closest to their neighbours",
    },
    "state for each parameter": {
        MoCo: "averages of the gradients, weighted by their products",
        DBMTL: "averages of the log-losses' gradients, scaled to one length",
        ExcessMTL: "weights that grow with how far a task is from its optimum",
        PseudoMomentum: "ConFIG of the tasks' momenta, for one task a step or several",
        Bloop: "the main task's gradient, and the others' orthogonal to its average",
    },
    "element by element": {
        GradDrop: "the gradients of one sign, drawn by how much the tasks agree",
        TrimmedMean: "the mean without the most extreme gradients",
        Median: "the middle gradient",
    },
    "two batches": {
        MoDo: "a projected gradient step of the weights",
        SDMGrad: "the same, regularised towards a preference",
    },
    "wrapper": {
        CRMOGM: "another method's weights, smoothed over the steps",
        Compose: "one method's scaling, then another method",
    },
}

__all__ = [
    "CRMOGM",
    "DBMTL",
    "FAMILIES",
    "IMTLG",
    "MGDA",
    "PCD",
    "Aggregator",
    "AlignedMTL",
    "AsksJacobian",
    "AsksPart",
    "Bloop",
    "CAGrad",
    "ClipNorm",
    "Compose",
    "ConFIG",
    "Constant",
    "CrossNorm",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "GramAggregator",
    "Groups",
    "InverseNorm",
    "Krum",
    "Mean",
    "Median",
    "MetaBalance",
    "MoCo",
    "MoDo",
    "NashMTL",
    "NormBalance",
    "PCGrad",
    "Part",
    "Products",
    "PseudoMomentum",
    "Random",
    "Reads",
    "RowsJacobian",
    "SDMGrad",
    "Step",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "do_nothing",
    "parts_of",
]
