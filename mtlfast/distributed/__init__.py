"""Exact surgery over several processes: the mean of the ranks' task gradients, shared out among the ranks.

`mtlfast.backward(..., process_group=)` uses it. `docs/distributed.md` says how.
"""

from mtlfast.distributed._checkpoint import load_state
from mtlfast.distributed._over_ranks import over_ranks, stored_over_ranks

__all__ = ["load_state", "over_ranks", "stored_over_ranks"]
