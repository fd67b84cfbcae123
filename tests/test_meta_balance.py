"""MetaBalance, by hand and against its authors' update."""

import pytest
import torch
from torch import nn

import mtlfast
from mtlfast.aggregation import MetaBalance, Reads


def rows(norms):
    return torch.diag(torch.tensor(norms, dtype=torch.float64))


def test_the_first_step_brings_lengths_nearer_to_the_first():
    method = MetaBalance(relax=0.75)
    assert method.reads is Reads.NORMS
    torch.testing.assert_close(method(rows([2.0, 4.0, 1.0])), torch.tensor([2, 0.625 * 4, 1.75], dtype=torch.float64))


def test_several_steps_are_those_of_the_authors_code():
    """Their averages start at zero and are not corrected, which the ratios do not see."""
    torch.manual_seed(0)
    method, averages, relax, beta = MetaBalance(relax=0.7, beta=0.9), torch.zeros(3), 0.7, 0.9
    for _ in range(6):
        gradients = torch.randn(3, 10, dtype=torch.float64)
        averages = beta * averages + (1 - beta) * gradients.norm(dim=1)
        wanted = gradients[0] + sum(
            relax * gradients[i] * averages[0] / averages[i] + (1 - relax) * gradients[i] for i in (1, 2)
        )
        torch.testing.assert_close(method(gradients), wanted)


def test_an_absent_task_keeps_its_average():
    method = MetaBalance(relax=1.0)
    method(rows([2.0, 4.0, 1.0]))
    before = method.state.clone()
    method(torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64), tasks=[0, 2])
    assert torch.equal(method.state[:, 1], before[:, 1])
    assert (method.state[:, [0, 2]] != before[:, [0, 2]]).all()
    without_main = method.weights(rows([5.0, 7.0]) @ rows([5.0, 7.0]), tasks=[1, 2])
    assert without_main.isfinite().all()  # by the main task's average of before


def test_weights_stay_where_nothing_is_known():
    assert MetaBalance(main_task=2).weights(torch.eye(2, dtype=torch.float64), tasks=[0, 1]).tolist() == [1, 1]
    assert MetaBalance().weights(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))).tolist() == [1, 1]


def test_the_loss_scale_may_change():
    plain, scaled = MetaBalance(), MetaBalance()
    for step in range(3):
        gradients = torch.randn(3, 10, dtype=torch.float64)
        scale = 2.0 ** (4 * step)
        torch.testing.assert_close(scaled(scale * gradients, loss_scale=scale), scale * plain(gradients))
    torch.testing.assert_close(plain.state, scaled.state)


def test_each_tensor_by_itself():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    losses = [3 * first[0] + second[0], first[1] + 4 * second[1]]
    step = mtlfast.backward(losses, MetaBalance(relax=1.0), shared={"a": first, "b": second}, groups="tensor")
    torch.testing.assert_close(step.by_group["a"].weights.tolist(), [1.0, 3.0])
    torch.testing.assert_close(step.by_group["b"].weights.tolist(), [1.0, 0.25])
    assert second.grad.tolist() == pytest.approx([1, 1])
