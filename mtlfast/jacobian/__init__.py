"""The ways to compute the Jacobian of the task losses. Each is a subclass of `Jacobian`, in a file of its own."""

from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._stored import StoredJacobian

__all__ = ["Jacobian", "StoredJacobian"]
