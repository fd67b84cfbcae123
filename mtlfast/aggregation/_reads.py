"""What of the gradients an aggregator looks at."""

from enum import IntEnum


class Reads(IntEnum):
    """What a method reads of the task gradients; the rest is not computed.

    NORMS costs one read of the gradients as GRAM does, and K products an element in place of K^2 / 2.
    """

    NOTHING = 0
    NORMS = 1  # the Gram matrix's diagonal
    GRAM = 2
    CROSS_GRAM = 3  # the products of two batches' gradients
    ROWS = 4  # the gradients themselves, element by element
