"""The ops: each checks its arguments, then calls the compiled kernel or the plain-PyTorch reference."""

from mtlfast.ops.combine import combine
from mtlfast.ops.flatten import flatten, unflatten
from mtlfast.ops.gram import gram, norms
from mtlfast.ops.project import project
from mtlfast.ops.scale import scale_
from mtlfast.ops.solve import solve

__all__ = ["combine", "flatten", "gram", "norms", "project", "scale_", "solve", "unflatten"]
