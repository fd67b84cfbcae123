"""Loss weightings: losses in, one weighted loss out; `python -m mtlfast methods` prints what is here.

Names are those of torchjd.scalarization where it has the method; the long names of the literature are there as well.
"""

# They weigh no losses and are documented in mtlfast.training; code that imports them from here keeps working.
from mtlfast.training import TaskSampler as TaskSampler
from mtlfast.training import parameter_groups as parameter_groups
from mtlfast.weighting._base import LossWeighting
from mtlfast.weighting._famo import FAMO
from mtlfast.weighting._fixed import ClassBalanced, Constant, InverseSampleSize, Mean, Sum
from mtlfast.weighting._freeze_converged import FreezeConverged
from mtlfast.weighting._go4align import GO4Align
from mtlfast.weighting._learned import IMTLL, UW
from mtlfast.weighting._loss_rates import DWA, ReLoBRaLo, SoftAdapt
from mtlfast.weighting._performance import DynamicTaskPrioritization, InversePerformance
from mtlfast.weighting._random import Random
from mtlfast.weighting._rescaling import LossRescaling
from mtlfast.weighting._scalarizations import COSMOS, PBI, STCH, GeometricMean, Tchebycheff
from mtlfast.weighting._schedules import AnnealingSchedule, CurriculumSchedule, PriorityTask

# The table of contents: family -> its weightings, and what each does.
FAMILIES: dict[str, dict[type[LossWeighting], str]] = {
    "fixed": {
        Sum: "all the same, added up",
        Mean: "the same over K",
        Constant: "weights that the user fixes",
        InverseSampleSize: "tasks with less data weigh more",
        ClassBalanced: "by the effective number of samples",
        LossRescaling: "losses over their first value, their mean, or in logarithms",
        Random: "weights drawn at each step",
    },
    "by performance": {
        InversePerformance: "tasks that do worse weigh more",
        DynamicTaskPrioritization: "hard tasks first, by a focal loss of their metric",
        DWA: "losses that fall slowly weigh more, by the epoch or a window",
        SoftAdapt: "losses that rise weigh more, by the step",
        ReLoBRaLo: "losses that fell less since the last step, or the first",
        FAMO: "all losses fall at one relative rate",
        GO4Align: "groups of tasks that advance alike share a weight",
    },
    "learned": {
        UW: "uncertainties, learned with the model",
        IMTLL: "scales that bring losses to one size, learned",
    },
    "scalarization": {
        GeometricMean: "each loss weighs by the inverse of its size",
        Tchebycheff: "the worst task alone",
        STCH: "the worst task, smoothly",
        PBI: "along a preferred direction, with a penalty off it",
        COSMOS: "a weighted sum that turns towards the preference",
    },
    "schedule": {
        CurriculumSchedule: "tasks enter one after another",
        AnnealingSchedule: "weights move from one value to another",
        FreezeConverged: "tasks whose loss is flat are left aside until it rises",
        PriorityTask: "one task's weight is held, the others share the rest",
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
    "InversePerformance",
    "InverseSampleSize",
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
