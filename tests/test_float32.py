"""The float32 update is that of the same numbers in float64, wherever that update itself is stable.

tests/stability.py says which gradients, and what stable is. MTLFAST_GRID=all takes all of them, and pytest says at its
end how many updates were stable.
"""

from functools import partial

import pytest
import torch
from methods import METHODS, losses, numbers_of_tasks
from stability import KINDS, SEVERAL, Engine, Tally, judge_every_method, problems
from torch import Tensor

import mtlfast
from mtlfast import TaskGradients, _native, ops, reference
from mtlfast.aggregation import MGDA, Step
from mtlfast.aggregation._jacobian import RowsJacobian
from mtlfast.aggregation._reads import Reads

# dtype -> problems of a kind that a sample takes, and the most tasks and columns
SAMPLES = {torch.float32: (6, (16, 1_000_000)), torch.bfloat16: (2, (16, 10_000)), torch.float16: (2, (16, 10_000))}
NATIVE = Engine(partial(ops.gram, precision="exact"), ops.combine)
REFERENCE = Engine(partial(reference.gram, precision="exact"), reference.combine)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_right_as_in_float64(kind, record_property):
    for dtype, (sample, most) in SAMPLES.items():
        tally = Tally()
        for problem in problems(kind, dtype, sample, most):
            judge_every_method(tally, problem, {"native": NATIVE, "reference": REFERENCE})
        record_property(f"stable in {str(dtype)[6:]}", str(tally))
        tally.check()


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_references_solvers(kind, monkeypatch):
    monkeypatch.setattr(_native, "serves", lambda device: False)
    tally = Tally()
    for problem in problems(kind, torch.float32, 2, (8, 1000)):
        judge_every_method(tally, problem, {"reference": REFERENCE})
    tally.check()


class Asked(RowsJacobian):
    """A Jacobian that remembers the precision that it was asked for."""

    def gram(self, precision: str | None = None) -> Tensor:
        self.precision = precision
        return super().gram(precision)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_method_that_decides_by_products_asks_for_exact_sums(name):
    method = METHODS[name]
    (num_tasks, *_) = numbers_of_tasks(method, 5)
    jacobian = Asked(TaskGradients.from_matrix(torch.randn(num_tasks, 8)))
    aggregator = method.make()
    aggregator.weigh(jacobian, Step(num_tasks, losses(num_tasks)), need_gram=True)
    by_norms = aggregator.reads in (Reads.NOTHING, Reads.NORMS)
    fast = by_norms or name.startswith(("PCGrad", "GradVac"))
    assert jacobian.precision == (None if fast else "exact")
    for precision in ("fast", "exact"):
        aggregator.weigh(jacobian, Step(num_tasks, losses(num_tasks), precision=precision), need_gram=True)
        assert jacobian.precision == precision


def test_the_user_chooses():
    p = torch.ones(100, requires_grad=True)
    losses_of = [(p * torch.randn(100)).sum() for _ in range(5)]
    grams = [
        mtlfast.backward(losses_of, MGDA(), shared=[p], retain_graph=True, precision=precision).gram
        for precision in (None, "exact", "fast")
    ]
    assert torch.equal(grams[0], grams[1])
    assert torch.allclose(grams[0], grams[2], rtol=1e-5)
    p.grad = None
    with pytest.raises(ValueError, match="MGDA: precision is 'double', expected 'exact', 'fast' or None"):
        mtlfast.backward(losses_of, MGDA(), shared=[p], precision="double")
    with pytest.raises(ValueError, match="MGDA: precision is 'double', expected 'exact', 'fast' or None"):
        MGDA()(torch.ones(2, 2), precision="double")
    assert p.grad is None
