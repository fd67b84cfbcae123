"""What of the gradients an aggregator looks at."""

from enum import IntEnum


class Reads(IntEnum):
    """What a method reads of the task gradients; the rest is not computed.

    NORMS costs one read of the gradients as GRAM does, and K products an element in place of K^2 / 2.
    """

    NOTHING = 0
    NORMS = 1  # the Gram matrix's diagonal
    GRAM = 2
    EXACT_GRAM = 3  # the Gram matrix, to decide about ranks, hulls or feasibility: float32 sums can turn a decision
    CROSS_GRAM = 4  # the products of two batches' gradients
    ROWS = 5  # the gradients themselves, element by element

    @property
    def needs_gram(self) -> bool:
        """Is it the Gram matrix of one batch?"""
        return self in (Reads.GRAM, Reads.EXACT_GRAM)

    @property
    def precision(self) -> str | None:
        """The sums of the Gram matrix that the method needs, as `mtlfast.ops.gram` has them; None: whichever."""
        return "exact" if self is Reads.EXACT_GRAM else None
