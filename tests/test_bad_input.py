"""Promise 7: one sentence that names the op, the argument, what was expected and what came; nothing written before."""

import pytest
import torch

from mtlfast import TaskGradients, ops

GRADS = TaskGradients.from_rows([[torch.ones(2, 3), torch.ones(4)] for _ in range(3)])
W = torch.ones(3)
Z = torch.zeros


ROOM = torch.ones(16, dtype=torch.float16)
HALVES = TaskGradients.from_rows([[ROOM[8:12]]])  # bytes 16 to 24


def combine_into(*out, weights=W, **kwargs):
    return lambda: ops.combine(GRADS, weights, out=list(out), **kwargs)


CASES = [
    (
        lambda: ops.gram([[W]]),
        TypeError,
        "gram: grads is a list, expected TaskGradients (TaskGradients.from_rows makes one)",
    ),
    (
        lambda: ops.norms(W),
        TypeError,
        "norms: grads is a Tensor, expected TaskGradients (TaskGradients.from_rows makes one)",
    ),
    (
        lambda: ops.combine(GRADS, [1, 1, 1]),
        TypeError,
        "combine: weights is a list, expected a Tensor of shape [3] or [R, 3]",
    ),
    (lambda: ops.combine(GRADS, Z(2)), ValueError, "combine: weights has shape [2], expected [3] or [R, 3]"),
    (
        lambda: ops.combine(GRADS, Z(3, 2)),
        ValueError,
        "combine: weights has shape [3, 2], expected [3] or [R, 3]",
    ),
    (
        lambda: ops.combine(GRADS, Z(1, 1, 3)),
        ValueError,
        "combine: weights has shape [1, 1, 3], expected [3] or [R, 3]",
    ),
    (lambda: ops.combine(GRADS, Z(())), ValueError, "combine: weights has shape [], expected [3] or [R, 3]"),
    (
        lambda: ops.combine(GRADS, W.to(torch.cfloat)),
        TypeError,
        "combine: weights has dtype torch.complex64, expected a real one",
    ),
    (
        lambda: ops.combine(GRADS, W.to("meta")),
        ValueError,
        "combine: weights is on meta, expected cpu as the task gradients",
    ),
    (
        lambda: ops.combine(GRADS, W, accumulate=True),
        ValueError,
        "combine: accumulate is set, expected tensors to add to in out",
    ),
    (combine_into(Z(2, 3)), ValueError, "combine: out has 1 tensors, expected 2"),
    (combine_into(Z(2, 3), None), TypeError, "combine: out 1 is a NoneType, expected a Tensor"),
    (combine_into(Z(2, 3), Z(5)), ValueError, "combine: out 1 has shape [5], expected [4]"),
    (
        combine_into(Z(2, 3), Z(4), weights=Z(2, 3)),
        ValueError,
        "combine: out 0 has shape [2, 3], expected [2, 2, 3]",
    ),
    (
        combine_into(Z(2, 3), Z(4).double()),
        TypeError,
        "combine: out 1 has dtype torch.float64, expected torch.float32 as out 0",
    ),
    (
        combine_into(Z(2, 3).long(), Z(4)),
        TypeError,
        "combine: out 0 has dtype torch.int64, expected float32, float64, bfloat16 or float16",
    ),
    (
        combine_into(Z(2, 3), Z(4), dtype=torch.float64),
        TypeError,
        "combine: out 0 has dtype torch.float32, expected torch.float64 as dtype says",
    ),
    (
        lambda: ops.combine(GRADS, W, dtype=torch.int64),
        TypeError,
        "combine: dtype is torch.int64, expected float32, float64, bfloat16 or float16",
    ),
    (
        lambda: ops.combine(GRADS, W, dtype="half"),
        TypeError,
        "combine: dtype is half, expected float32, float64, bfloat16 or float16",
    ),
    (
        combine_into(Z(2, 3), Z(4, device="meta")),
        ValueError,
        "combine: out 1 is on meta, expected cpu as the task gradients",
    ),
    (combine_into(Z(3, 2).T, Z(4)), ValueError, "combine: out 0 has strides [1, 2], expected [3, 1]"),
    (
        combine_into(Z(2, 3), GRADS.rows[0][0].view(-1)[:4]),
        ValueError,
        "combine: out 1 shares memory with task 0's gradient of tensor 0, expected memory of its own",
    ),
    (
        lambda: ops.combine(HALVES, Z(1), out=[ROOM[8:12].view(torch.bfloat16)]),
        ValueError,
        "combine: out 0 shares memory with task 0's gradient of tensor 0, expected memory of its own",
    ),
    (
        lambda: ops.combine(HALVES, Z(1), out=[ROOM.view(torch.float32)[1:5]]),
        ValueError,
        "combine: out 0 shares memory with task 0's gradient of tensor 0, expected memory of its own",
    ),
    (
        combine_into(*(lambda x: (x[:6].view(2, 3), x[5:]))(Z(9))),
        ValueError,
        "combine: out 0 shares memory with out 1, expected memory of its own",
    ),
    (lambda: ops.scale_(GRADS, Z(2)), ValueError, "scale_: factors has shape [2], expected [3]"),
    (lambda: ops.scale_(GRADS, Z(1, 3)), ValueError, "scale_: factors has shape [1, 3], expected [3]"),
    (
        lambda: ops.flatten(GRADS, torch.int64),
        TypeError,
        "flatten: dtype is torch.int64, expected float32, float64, bfloat16 or float16",
    ),
    (lambda: ops.unflatten(Z(9), GRADS), ValueError, "unflatten: vector has shape [9], expected [10]"),
    (lambda: ops.unflatten(Z(2, 5), GRADS), ValueError, "unflatten: vector has shape [2, 5], expected [10]"),
    (lambda: ops.project(GRADS, W), TypeError, "project: order is torch.float32, expected an int64 Tensor"),
    (
        lambda: ops.project(GRADS, Z(3, 3, dtype=torch.int64)),
        ValueError,
        "project: order has shape [3, 3], expected [3, 2]",
    ),
    (
        lambda: ops.project(GRADS, torch.tensor([[1, 2], [0, 0], [0, 1]])),
        ValueError,
        "project: order row 1 is [0, 0], expected each task but 1 once",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message[:60] for *_, message in CASES])
def test_one_sentence(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


@pytest.mark.cuda
def test_two_devices_are_both_named():
    with pytest.raises(ValueError, match="task 1, tensor 0 is on cuda:0, expected cpu"):
        TaskGradients.from_rows([[torch.ones(2)], [torch.ones(2, device="cuda")]])


def test_nothing_is_written_before_the_check():
    out = [torch.full((2, 3), 7.0), torch.zeros(5)]
    with pytest.raises(ValueError):
        ops.combine(GRADS, W, out=out)
    assert (out[0] == 7).all()
    with pytest.raises(ValueError):
        ops.scale_(GRADS, torch.zeros(2))
    assert all((g == 1).all() for g in GRADS.flat())
