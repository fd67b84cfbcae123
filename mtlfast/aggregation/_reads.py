"""What an aggregator looks at of the task gradients."""

from enum import IntEnum


class Reads(IntEnum):
    """What a method reads of the task gradients. What it does not read is not computed.

    NORMS reads the gradients once, like GRAM, but takes K products for each element instead of K^2 / 2.
    """

    NOTHING = 0
    NORMS = 1  # the Gram matrix's diagonal
    GRAM = 2
    EXACT_GRAM = 3  # the Gram matrix in exact sums: an error of float32 sums can turn a decision about ranks or hulls
    CROSS_GRAM = 4  # the products of two batches' gradients
    ROWS = 5  # the gradients themselves, element by element
    STATE = 6  # the gradients, and state that is kept for each parameter

    @property
    def needs_gram(self) -> bool:
        """Whether the method reads the Gram matrix of one batch."""
        return self in (Reads.GRAM, Reads.EXACT_GRAM)

    @property
    def precision(self) -> str | None:
        """The `precision` of `mtlfast.ops.gram` that the method needs; None: any."""
        return "exact" if self is Reads.EXACT_GRAM else None
