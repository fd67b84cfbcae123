"""Loss weightings, which make one weighted loss of the task losses. `python -m mtlfast methods` prints them all.

A method that torchjd.scalarization has too has its name there. Long names of the literature work as well.
"""

# These two belong to mtlfast.training. Code that imports them from here keeps working.
from mtlfast.training import TaskSampler as TaskSampler
from mtlfast.training import parameter_groups as parameter_groups
from mtlfast.weighting._base import LossWeighting
from mtlfast.weighting._famo import FAMO
from mtlfast.weighting._fixed import ClassBalanced, Constant, InverseSampleSize, Mean, Sum
from mtlfast.weighting._freeze_converged import FreezeConverged
from mtlfast.weighting._go4align import GO4Align
from mtlfast.weighting._gradnorm import GradNorm
from mtlfast.weighting._learned import IMTLL, UW
from mtlfast.weighting._loss_rates import DWA, ReLoBRaLo, SoftAdapt
from mtlfast.weighting._norm_ratios import AdaptiveWeight, InverseNormLoss, LRAnnealing
from mtlfast.weighting._performance import DynamicTaskPrioritization, InversePerformance
from mtlfast.weighting._random import Random
from mtlfast.weighting._rescaling import LossRescaling
from mtlfast.weighting._scalarizations import COSMOS, PBI, STCH, GeometricMean, Tchebycheff
from mtlfast.weighting._schedules import AnnealingSchedule, CurriculumSchedule, PriorityTask
from mtlfast.weighting._uwso import UWSO

# The table of contents: each family's weightings, and what each does.
FAMILIES: dict[str, dict[type[LossWeighting], str]] = {
    "fixed": {
        Sum: "the sum of the losses",
        Mean: "the mean of the losses",
        Constant: "weights that the user fixes",
        InverseSampleSize: "tasks with less data weigh more",
        ClassBalanced: "weights by the effective number of samples",
        LossRescaling: "losses divided by their first value or mean, or logarithms",
        Random: "weights drawn at each step",
    },
    "by performance": {
        InversePerformance: "tasks that do worse weigh more",
        DynamicTaskPrioritization: "hard tasks weigh more, by a focal loss of their metric",
        DWA: "losses that fall slowly over epochs weigh more",
        SoftAdapt: "losses that rise from step to step weigh more",
        ReLoBRaLo: "losses that fell less since the last or first step weigh more",
        FAMO: "all losses fall at one relative rate",
        GO4Align: "groups of tasks that advance alike share a weight",
        UWSO: "tasks with smaller losses weigh more, by a softmax",
    },
    "by gradient norms": {
        GradNorm: "gradients of one norm, longer for tasks that train slowly",
        InverseNormLoss: "each loss weighs by the inverse of its gradient's norm",
        LRAnnealing: "all gradients are brought to the size of one task's",
        AdaptiveWeight: "one gradient is brought to the length of another's",
    },
    "learned": {
        UW: "uncertainties that are learned with the model",
        IMTLL: "learned scales that bring the losses to one size",
    },
    "scalarization": {
        GeometricMean: "each loss weighs by the inverse of its size",
        Tchebycheff: "the largest weighted loss alone",
        STCH: "a smooth maximum of the weighted losses",
        PBI: "progress along a preferred direction, with a penalty off it",
        COSMOS: "a weighted sum that turns towards the preference",
    },
    "schedule": {
        CurriculumSchedule: "tasks enter one after another",
        AnnealingSchedule: "weights move from one value to another",
        FreezeConverged: "tasks whose loss is flat are left aside until it rises",
        PriorityTask: "one task's weight is fixed, the others share the rest",
    },
}

Equal = Sum
RandomLossWeighting = Random
DynamicWeightAverage = DWA
UncertaintyWeighting = UW
SmoothTchebycheff = STCH

__all__ = [
    "COSMOS",
    "DWA",
    "FAMILIES",
    "FAMO",
    "IMTLL",
    "PBI",
    "STCH",
    "UW",
    "UWSO",
    "AdaptiveWeight",
    "AnnealingSchedule",
    "ClassBalanced",
    "Constant",
    "CurriculumSchedule",
    "DynamicTaskPrioritization",
    "DynamicWeightAverage",
    "Equal",
    "FreezeConverged",
    "GO4Align",
    "GeometricMean",
    "GradNorm",
    "InverseNormLoss",
    "InversePerformance",
    "InverseSampleSize",
    "LRAnnealing",
    "LossRescaling",
    "LossWeighting",
    "Mean",
    "PriorityTask",
    "Random",
    "RandomLossWeighting",
    "ReLoBRaLo",
    "SmoothTchebycheff",
    "SoftAdapt",
    "Sum",
    "Tchebycheff",
    "UncertaintyWeighting",
]
