"""TaskGradients: what it takes, what it copies, and what it says of what it cannot take."""

import copy
import pickle

import pytest
import torch
from cases import draw, laid_out

from mtlfast import TaskGradients, ops


def test_nothing_regular_is_copied():
    rows = [[torch.randn(3, 4), None, laid_out(torch.randn(2, 3, 4, 5), "channels_last")] for _ in range(3)]
    grads = TaskGradients.from_rows(rows)
    assert all(a is b for a, b in zip(grads.flat(), [g for row in rows for g in row], strict=True))
    assert grads.num_tasks == 3
    assert grads.numel() == 12 + 120
    assert grads.shapes == (torch.Size([3, 4]), None, torch.Size([2, 3, 4, 5]))
    assert (grads.dtype, grads.device) == (torch.float32, torch.device("cpu"))
    assert repr(grads) == "TaskGradients(3 tasks x 3 tensors, 132 elements, torch.float32, cpu)"


def test_stacked_and_matrix_are_views():
    jac = [torch.randn(4, 3, 2), torch.randn(4, 5), torch.randn(4)]
    grads = TaskGradients.from_stacked(jac)
    assert [g.data_ptr() for g in grads.rows[2]] == [x[2].data_ptr() for x in jac]
    assert grads.shapes == (torch.Size([3, 2]), torch.Size([5]), torch.Size([]))
    J = torch.randn(4, 11)
    assert torch.equal(ops.flatten(TaskGradients.from_matrix(J)), J)
    assert TaskGradients.from_matrix(J).rows[1][0].data_ptr() == J[1].data_ptr()


@pytest.mark.parametrize(
    ("first", "second", "copied"),
    [
        (torch.ones(6).expand(4, 6), torch.randn(4, 6), (True, False)),  # stride 0, as p.sum() gives
        (torch.ones(()).expand(4, 6), torch.ones(()).expand(4, 6), (True, True)),
        (torch.randn(4, 6), torch.randn(6, 4).T, (False, True)),  # strides that differ
        (torch.randn(4, 12)[:, ::2], torch.randn(4, 6), (True, False)),  # not dense
        (torch.randn(12).as_strided((4, 6), (1, 1)), torch.randn(4, 6), (True, False)),  # overlapping
        (torch.randn(4, 1, 6)[:, :, :], torch.randn(4, 6).as_strided((4, 1, 6), (6, 99, 1)), (False, False)),
        (torch.empty(0, 6), torch.empty(6, 0).T, (False, False)),
        (
            torch.randn(4, 6),
            torch.randn(4, 6, dtype=torch.cfloat).conj().imag,
            (False, True),
        ),  # lazily negated
    ],
)
def test_only_offending_tensors_are_made_dense(first, second, copied):
    rows = [[first, torch.randn(3)], [second, torch.randn(3)]]
    grads = TaskGradients.from_rows(rows)
    for k in range(2):
        assert (grads.rows[k][0] is not rows[k][0]) == copied[k]
        assert torch.equal(grads.rows[k][0], rows[k][0])
        assert grads.rows[k][1] is rows[k][1]
    pairs = [(a.double(), b.double()) for a, b in zip(*rows, strict=True)]
    size = sum((a * b).abs().sum() for a, b in pairs)
    assert (ops.gram(grads)[0, 1] - sum((a * b).sum() for a, b in pairs)).abs() <= 1e-6 * size


def test_one_tensor_twice_is_read_twice():
    x = torch.randn(50)
    grads = TaskGradients.from_rows([[x, x], [x, x]])
    assert grads.rows[0][1] is x
    assert torch.allclose(ops.gram(grads), 2 * (x.double() @ x.double()).expand(2, 2))


def test_no_tensor_at_all_is_neutral():
    for rows in ([[], []], [[None], [None]]):
        grads = TaskGradients.from_rows(rows)
        assert torch.equal(ops.gram(grads), torch.zeros(2, 2, dtype=torch.float64))
        assert torch.equal(ops.norms(grads), torch.zeros(2, dtype=torch.float64))
        assert ops.combine(grads, torch.ones(2)) == [None] * len(rows[0])
        assert ops.flatten(grads).shape == (2, 0)
        assert ops.unflatten(torch.empty(0), grads) == [None] * len(rows[0])
        ops.scale_(grads, torch.ones(2))
        assert ops.project(grads).num_tasks == 2


def test_gradients_that_require_grad_are_constants():
    x = torch.randn(5, requires_grad=True)
    grads = TaskGradients.from_rows([[x], [x * 2]])
    assert not ops.gram(grads).requires_grad
    (direction,) = ops.combine(grads, torch.ones(2))
    assert not direction.requires_grad


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "TaskGradients: got 0 tasks, expected at least one"),
        (
            [[torch.zeros(2)], [torch.zeros(2), None]],
            ValueError,
            "TaskGradients: task 1 has 2 tensors, expected 1 as task 0",
        ),
        (
            [[torch.zeros(2), torch.zeros(3, 4)], [None, torch.zeros(4, 3)]],
            ValueError,
            "TaskGradients: task 1, tensor 1 has shape [4, 3], expected [3, 4] as its other tasks",
        ),
        (
            [[torch.zeros(2)], [torch.zeros(2).double()]],
            TypeError,
            "TaskGradients: task 1, tensor 0 has dtype torch.float64, expected torch.float32 as the others",
        ),
        (
            [[torch.zeros(2, dtype=torch.int32)]],
            TypeError,
            "TaskGradients: task 0, tensor 0 has dtype torch.int32, expected float32, float64, bfloat16 or float16",
        ),
        (
            [[torch.zeros(2)], [torch.zeros(2, device="meta")]],
            ValueError,
            "TaskGradients: task 1, tensor 0 is on meta, expected cpu as the others",
        ),
        (
            [[torch.zeros(2)], [[0.0, 0.0]]],
            TypeError,
            "TaskGradients: task 1, tensor 0 is a list, expected a Tensor or None",
        ),
        (
            [[torch.zeros(2, 2).to_sparse()]],
            TypeError,
            "TaskGradients: task 0, tensor 0 has layout torch.sparse_coo, expected torch.strided (dense)",
        ),
    ],
)
def test_bad_rows(rows, error, message):
    with pytest.raises(error) as raised:
        TaskGradients.from_rows(rows)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("make", "argument", "message"),
    [
        (TaskGradients.from_stacked, [], "TaskGradients.from_stacked: got no tensor, expected at least one"),
        (
            TaskGradients.from_stacked,
            [torch.zeros(2, 3), torch.zeros(3, 3)],
            "TaskGradients.from_stacked: tensor 1 has shape [3, 3], expected [2, ...]",
        ),
        (
            TaskGradients.from_stacked,
            [torch.zeros(())],
            "TaskGradients.from_stacked: tensor 0 has shape [], expected [K, ...]",
        ),
        (
            TaskGradients.from_matrix,
            torch.zeros(3),
            "TaskGradients.from_matrix: matrix has shape [3], expected [K, P]",
        ),
    ],
)
def test_bad_stacks_and_matrices(make, argument, message):
    with pytest.raises(ValueError) as raised:
        make(argument)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda grads: pickle.loads(pickle.dumps(grads))],
    ids=["copy", "deep", "pickle"],
)
def test_copies(copied, device):
    grads = draw(3, [(4, 5), (), (0,), (7,)], missing=0.2, device=device)
    again = copied(grads)
    assert torch.equal(ops.gram(again), ops.gram(grads))
    assert again.shapes == grads.shapes
    shares = any(a is b for a, b in zip(again.flat(), grads.flat(), strict=True) if a is not None)
    assert shares == (copied is copy.copy)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    known = copied(TaskGradients.from_rows([[torch.ones(2)]], parameters))
    assert torch.equal(known.parameters[0], parameters[0])
