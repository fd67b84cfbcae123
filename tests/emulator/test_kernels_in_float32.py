"""The CUDA kernels, compiled for the CPU: their float32 update is as right as float64's.

As tests/test_float32.py, which says more.
"""

from functools import partial

import pytest
import torch
from emulate import Emulator
from stability import KINDS, Engine, Tally, judge_every_method, problems

from mtlfast import ops

SAMPLES = {torch.float32: 2, torch.bfloat16: 1}  # problems of a kind


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_right_as_in_float64(emulator: Emulator, kind, monkeypatch):
    monkeypatch.setattr(ops, "solve", emulator.solve)
    tally, engine = Tally(), Engine(partial(emulator.gram, name="gram_exact"), emulator.combine)
    for dtype, sample in SAMPLES.items():
        for problem in problems(kind, dtype, sample, (16, 4096)):
            judge_every_method(tally, problem, {"emulated": engine})
    tally.check()
