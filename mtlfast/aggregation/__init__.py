"""Aggregators: task gradients in, one update direction out.

Fixed weights: Sum, Mean, Constant. Projections: PCGrad.
"""

from mtlfast.aggregation._base import Aggregator, GramAggregator
from mtlfast.aggregation._fixed import Constant, Mean, Sum
from mtlfast.aggregation._pcgrad import PCGrad

__all__ = ["Aggregator", "Constant", "GramAggregator", "Mean", "PCGrad", "Sum"]
