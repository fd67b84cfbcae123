"""Gradient surgery for multi-task learning on PyTorch, at the speed of memory."""

from importlib.metadata import PackageNotFoundError, version

from mtlfast import aggregation, monitor, ops, reference, training, weighting
from mtlfast._backward import backward
from mtlfast._by_name import methods, weightings
from mtlfast._step_result import StepResult
from mtlfast.jacobian import TaskGradientAccumulator
from mtlfast.task_gradients import TaskGradients
from mtlfast.training._surgery_optimizer import SurgeryOptimizer

try:
    __version__ = version("mtlfast")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "unknown"

__all__ = [
    "StepResult",
    "SurgeryOptimizer",
    "TaskGradientAccumulator",
    "TaskGradients",
    "aggregation",
    "backward",
    "methods",
    "monitor",
    "ops",
    "reference",
    "training",
    "weighting",
    "weightings",
]
