"""What of the gradients an aggregator's weights depend on."""

from enum import IntEnum


class Reads(IntEnum):
    """What `GramAggregator.weights` reads of its Gram matrix; the rest is not computed.

    NORMS costs one read of the gradients as GRAM does, and K products an element in place of K^2 / 2.
    """

    NOTHING = 0
    NORMS = 1  # the diagonal
    GRAM = 2
