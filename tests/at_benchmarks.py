"""Makes the programs in benchmarks/ importable, and skips a test file where these or TorchJD are absent.

Import it before them.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torchjd")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

VMAP = "ignore:There is a performance drop:UserWarning"  # of torch.vmap, which TorchJD uses
