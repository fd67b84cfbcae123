"""The examples run, and learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
CODE = """
import sys
from pathlib import Path
from main import run
metrics = run(seeds=1, epochs=8, out=Path(sys.argv[1]), progress=False)
print([metrics[method]["left"][0] for method in ("single-task", "Sum", "PCGrad")])
"""


@pytest.mark.skipif(not DIGITS.exists(), reason="needs the checkout")
def test_digits_learn_with_every_method(tmp_path):
    pytest.importorskip("sklearn")
    picture = tmp_path / "digits.png"

    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE, str(picture)], cwd=DIGITS, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    accuracies = json.loads(run.stdout)
    assert min(accuracies) > 50  # a guess is right in 10 %
    assert picture.stat().st_size > 10_000
