"""An argument that is refused and a step that fails change no state, generator or gradient."""

import pytest
import torch
from methods import METHODS
from torch import Tensor

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import GramAggregator, Step, Sum
from mtlfast.weighting import FAMO, UW

WRONG = {
    "float32": torch.eye(3),
    "not square": torch.ones(2, 3, dtype=torch.float64),
    "a vector": torch.ones(3, dtype=torch.float64),
    "a list": [[1.0]],
    "None": None,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("gram", WRONG.values(), ids=WRONG)
def test_what_is_no_gram_matrix(name, gram):
    aggregator = METHODS[name].make()
    before, drawn = aggregator.state_dict(), torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=r"gram is .*, expected"):
        aggregator.weights(gram)
    assert torch.equal(torch.get_rng_state(), drawn)
    after = aggregator.state_dict()
    assert before.keys() == after.keys()


class Wrong(GramAggregator):
    """An aggregator whose `solve` returns what it must not."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        return self.result


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ([0.5, 0.5], "Wrong: solve returned a list, expected a Tensor"),
        (torch.ones(3), r"Wrong: solve returned \[3\], expected \[2\]"),
    ],
)
def test_what_a_users_own_solve_may_not_return(result, sentence):
    p = torch.ones(2, requires_grad=True)
    for call in (
        lambda: mtlfast.backward([p.sum(), (2 * p).sum()], Wrong(result), shared=[p]),
        lambda: Wrong(result)(torch.ones(2, 2)),
        lambda: Wrong(result).weights(torch.eye(2, dtype=torch.float64)),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            call()
    assert p.grad is None


def test_weights_of_another_dtype_become_float64():
    p = torch.ones(2, requires_grad=True)
    result = mtlfast.backward([p.sum(), (2 * p).sum()], Wrong(torch.ones(2)), shared=[p])
    assert result.weights.dtype == torch.float64
    assert p.grad.tolist() == [3, 3]


def test_a_gradient_that_cannot_be_added_to():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    a.grad, b.grad = torch.ones(2), torch.ones(1).expand(2)
    with pytest.raises(RuntimeError, match=r"the \.grad of a parameter of shape \[2\] is an expanded tensor"):
        mtlfast.backward([(a * b).sum(), a.sum()], Sum(), shared=[a, b])
    assert a.grad.tolist() == [1, 1]


@pytest.mark.native
def test_memory_that_a_tensor_gave_up_is_kept():
    # The kernels read by pointer: what `.data` exchanges must not be freed below them.
    gradients = [torch.ones(1000) for _ in range(3)]
    grads = TaskGradients.from_rows([[g] for g in gradients])
    gradients[0].data = torch.full((1000,), 2.0)
    others = [torch.full((1000,), 7.0) for _ in range(50)]
    assert ops.gram(grads)[0, 0] == 1000
    assert all(bool((x == 7).all()) for x in others)


@pytest.mark.parametrize("scale", [torch.tensor([[2.0]]), torch.tensor([2.0]), 2, torch.tensor(2.0)], ids=str)
def test_a_loss_scale_of_one_element_has_any_shape(scale):
    p = torch.ones(2, requires_grad=True)
    losses = [2 * p.sum(), 4 * p.square().sum()]
    expected = UW(2).step_weights(torch.tensor([4.0, 8.0]), loss_scale=2.0).loss_weights
    result = mtlfast.backward(losses, Sum(), shared=[p], weighting=UW(2), loss_scale=scale)
    assert torch.allclose(result.loss_weights, expected)


@pytest.mark.parametrize(
    "scale", [10**330, 0, -1.0, "2", True, torch.ones(2), torch.tensor(0.0)], ids=lambda x: str(x)[:9]
)
def test_what_is_no_loss_scale(scale):
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"loss_scale .*, expected a number"):
        mtlfast.backward([p.sum()], Sum(), shared=[p], loss_scale=scale)


def test_a_weighting_works_in_inference_mode():
    p = torch.ones(2, requires_grad=True)
    losses = [p.sum(), (2 * p).sum()]
    with torch.inference_mode():
        mtlfast.backward(losses, Sum(), shared=[p], weighting=FAMO(2))
    assert p.grad is not None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TaskGradients.from_rows(None), "from_rows: rows is a NoneType, expected K lists"),
        (lambda: TaskGradients.from_rows([None]), "from_rows: rows is a list with another entry, expected K lists"),
        (lambda: TaskGradients.from_stacked(None), "from_stacked: jac is a NoneType, expected T tensors"),
        (lambda: TaskGradients.from_stacked([[1.0]]), "from_stacked: jac is a list with another entry, expected T"),
        (lambda: TaskGradients.from_matrix([[1.0]]), "from_matrix: matrix is a list, expected a Tensor"),
        (lambda: ops.solve(None, "mgda"), "solve: gram is a NoneType, expected a Tensor"),
        (
            lambda: Sum().weights(torch.eye(2).double(), tasks=["a", 1]),
            r"tasks is \['a', 1\], expected the present tasks",
        ),
    ],
)
def test_other_types_get_one_sentence(make, sentence):
    with pytest.raises(TypeError, match=sentence):
        make()
