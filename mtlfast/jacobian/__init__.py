"""The ways to compute the Jacobian of the task losses. Each is a subclass of `Jacobian`, in a file of its own."""

from mtlfast.jacobian._accumulated import AccumulatedJacobian, TaskGradientAccumulator
from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._closures import ClosuresJacobian
from mtlfast.jacobian._features import FeaturesJacobian
from mtlfast.jacobian._implicit import ImplicitJacobian
from mtlfast.jacobian._plan import LayerPlan, Plan
from mtlfast.jacobian._stored import StoredJacobian
from mtlfast.jacobian._two_batches import TwoBatchesJacobian

__all__ = [
    "AccumulatedJacobian",
    "ClosuresJacobian",
    "FeaturesJacobian",
    "ImplicitJacobian",
    "Jacobian",
    "LayerPlan",
    "Plan",
    "StoredJacobian",
    "TaskGradientAccumulator",
    "TwoBatchesJacobian",
]
