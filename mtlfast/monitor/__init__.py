"""Watches how the tasks' gradients lie over many steps, and says what it sees in words, numbers and pictures."""

from mtlfast.monitor._comparison import Comparison
from mtlfast.monitor._findings import Finding
from mtlfast.monitor._monitor import ConflictMonitor
from mtlfast.monitor._statistics import Statistics

__all__ = ["Comparison", "ConflictMonitor", "Finding", "Statistics"]
