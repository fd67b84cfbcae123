"""Ways to have the Jacobian of the task losses: each answers the same questions (`Jacobian`), in a file of its own."""

from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._stored import StoredJacobian

__all__ = ["Jacobian", "StoredJacobian"]
