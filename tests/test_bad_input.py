"""Bad input raises one sentence that names the op, the argument, what was expected and what came.

Nothing has been written then (docs/promises.md).
"""

import pytest
import torch
from torch import Tensor

from mtlfast import TaskGradients, ops


class Given:
    """The arguments that fit, on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.grads = TaskGradients.from_rows([[self.zeros(2, 3) + 1, self.zeros(4) + 1] for _ in range(3)])
        self.weights = self.zeros(3) + 1
        self.two = (self.weights, self.weights)
        self.state = TaskGradients.from_rows([[self.zeros(2, 3), self.zeros(4)] for _ in range(3)])
        self.room = self.zeros(16).half()
        self.halves = TaskGradients.from_rows([[self.room[8:12]]])  # bytes 16 to 24 of the room

    def zeros(self, *shape, **kwargs) -> Tensor:
        return torch.zeros(*shape, **{"device": self.device, **kwargs})


@pytest.fixture
def given(device) -> Given:
    return Given(device)


def combine_into(given, *out, weights=None, **kwargs):
    return ops.combine(given.grads, given.weights if weights is None else weights, out=list(out), **kwargs)


MAKES = "expected TaskGradients (TaskGradients.from_rows makes one)"
CASES = [
    (
        lambda g: ops.gram([[g.weights]]),
        TypeError,
        "gram: grads is a list, expected TaskGradients (TaskGradients.from_rows makes one)",
    ),
    (
        lambda g: ops.gram(g.grads, other=[[g.weights]]),
        TypeError,
        "gram: other is a list, expected TaskGradients as grads",
    ),
    (lambda g: ops.gram(g.grads, other=g.halves), ValueError, "gram: other has 1 tensors, expected 2 as grads"),
    (
        lambda g: ops.gram(g.grads, other=TaskGradients.from_rows([[g.zeros(2, 3), g.zeros(2, 2)]])),
        ValueError,
        "gram: other's tensor 1 has shape [2, 2], expected [4] as grads",
    ),
    (
        lambda g: ops.gram(g.grads, other=TaskGradients.from_rows([[None, g.zeros(4).half()]])),
        TypeError,
        "gram: other has dtype torch.float16, expected torch.float32 as grads",
    ),
    (
        lambda g: ops.gram(g.grads, other=TaskGradients.from_rows([[g.zeros(2, 3, device="meta"), None]])),
        ValueError,
        "gram: other is on meta, expected {device} as grads",
    ),
    (
        lambda g: ops.norms(g.weights),
        TypeError,
        "norms: grads is a Tensor, expected TaskGradients (TaskGradients.from_rows makes one)",
    ),
    (
        lambda g: ops.combine(g.grads, [1, 1, 1]),
        TypeError,
        "combine: weights is a list, expected a Tensor of shape [3] or [R, 3]",
    ),
    (lambda g: ops.combine(g.grads, g.zeros(2)), ValueError, "combine: weights has shape [2], expected [3] or [R, 3]"),
    (
        lambda g: ops.combine(g.grads, g.zeros(3, 2)),
        ValueError,
        "combine: weights has shape [3, 2], expected [3] or [R, 3]",
    ),
    (
        lambda g: ops.combine(g.grads, g.zeros(1, 1, 3)),
        ValueError,
        "combine: weights has shape [1, 1, 3], expected [3] or [R, 3]",
    ),
    (lambda g: ops.combine(g.grads, g.zeros(())), ValueError, "combine: weights has shape [], expected [3] or [R, 3]"),
    (
        lambda g: ops.combine(g.grads, g.weights.to(torch.cfloat)),
        TypeError,
        "combine: weights has dtype torch.complex64, expected a real one",
    ),
    (
        lambda g: ops.combine(g.grads, g.weights.to("meta")),
        ValueError,
        "combine: weights is on meta, expected {device} as the task gradients",
    ),
    (
        lambda g: ops.combine(g.grads, g.weights, accumulate=True),
        ValueError,
        "combine: accumulate is True and out is None, expected the tensors to add to in out",
    ),
    (lambda g: combine_into(g, g.zeros(2, 3)), ValueError, "combine: out has 1 tensors, expected 2"),
    (lambda g: combine_into(g, g.zeros(2, 3), None), TypeError, "combine: out 1 is a NoneType, expected a Tensor"),
    (lambda g: combine_into(g, g.zeros(2, 3), g.zeros(5)), ValueError, "combine: out 1 has shape [5], expected [4]"),
    (
        lambda g: combine_into(g, g.zeros(2, 3), g.zeros(4), weights=g.zeros(2, 3)),
        ValueError,
        "combine: out 0 has shape [2, 3], expected [2, 2, 3]",
    ),
    (
        lambda g: combine_into(g, g.zeros(2, 3), g.zeros(4).double()),
        TypeError,
        "combine: out 1 has dtype torch.float64, expected torch.float32 as out 0",
    ),
    (
        lambda g: combine_into(g, g.zeros(2, 3).long(), g.zeros(4)),
        TypeError,
        "combine: out 0 has dtype torch.int64, expected float32, float64, bfloat16 or float16",
    ),
    (
        lambda g: combine_into(g, g.zeros(2, 3), g.zeros(4), dtype=torch.float64),
        TypeError,
        "combine: out 0 has dtype torch.float32, expected torch.float64 as dtype says",
    ),
    (
        lambda g: ops.combine(g.grads, g.weights, dtype=torch.int64),
        TypeError,
        "combine: dtype is torch.int64, expected float32, float64, bfloat16 or float16",
    ),
    (
        lambda g: ops.combine(g.grads, g.weights, dtype="half"),
        TypeError,
        "combine: dtype is half, expected float32, float64, bfloat16 or float16",
    ),
    (
        lambda g: combine_into(g, g.zeros(2, 3), g.zeros(4, device="meta")),
        ValueError,
        "combine: out 1 is on meta, expected {device} as the task gradients",
    ),
    (
        lambda g: combine_into(g, g.zeros(3, 2).T, g.zeros(4)),
        ValueError,
        "combine: out 0 has strides [1, 2], expected [3, 1]",
    ),
    (
        lambda g: combine_into(g, g.zeros(2, 3), g.grads.rows[0][0].view(-1)[:4]),
        ValueError,
        "combine: out 1 shares memory with task 0's gradient of tensor 0, expected memory of its own",
    ),
    (
        lambda g: ops.combine(g.halves, g.zeros(1), out=[g.room[8:12].view(torch.bfloat16)]),
        ValueError,
        "combine: out 0 shares memory with task 0's gradient of tensor 0, expected memory of its own",
    ),
    (
        lambda g: ops.combine(g.halves, g.zeros(1), out=[g.room.view(torch.float32)[1:5]]),
        ValueError,
        "combine: out 0 shares memory with task 0's gradient of tensor 0, expected memory of its own",
    ),
    (
        lambda g: combine_into(g, *(lambda x: (x[:6].view(2, 3), x[5:]))(g.zeros(9))),
        ValueError,
        "combine: out 0 shares memory with out 1, expected memory of its own",
    ),
    (
        lambda g: ops.trimmed_mean([[g.weights]], 1),
        TypeError,
        "trimmed_mean: grads is a list, expected TaskGradients (TaskGradients.from_rows makes one)",
    ),
    (
        lambda g: ops.trimmed_mean(g.grads, 2),
        ValueError,
        "trimmed_mean: trim_number is 2, expected less than half of the 3 tasks",
    ),
    (
        lambda g: ops.trimmed_mean(g.grads, 0.5),
        ValueError,
        "trimmed_mean: trim_number is 0.5, expected an integer of at least 0",
    ),
    (
        lambda g: ops.trimmed_mean(g.grads, 1, [g.zeros(2, 3).half(), g.zeros(4)]),
        TypeError,
        "trimmed_mean: out 0 has dtype torch.float16, expected torch.float32 as dtype says",
    ),
    (
        lambda g: ops.grad_drop(g.grads, 3),
        TypeError,
        "grad_drop: seed is a int, expected a Tensor of one int64 number",
    ),
    (
        lambda g: ops.grad_drop(g.grads, g.zeros(1)),
        ValueError,
        "grad_drop: seed is [1] torch.float32, expected one number of torch.int64",
    ),
    (
        lambda g: ops.grad_drop(g.grads, torch.ones(1, dtype=torch.int64, device="meta")),
        ValueError,
        "grad_drop: seed is on meta, expected {device} as the task gradients",
    ),
    (
        lambda g: ops.grad_drop(g.grads, g.zeros(1).long(), uniform=g.zeros(10)),
        ValueError,
        "grad_drop: got both seed and uniform, expected one of them",
    ),
    (
        lambda g: ops.grad_drop(g.grads, uniform=g.zeros(9)),
        ValueError,
        "grad_drop: uniform has shape [9], expected [10]",
    ),
    (
        lambda g: ops.grad_drop(g.grads, thresholds=[g.zeros(2, 3)]),
        ValueError,
        "grad_drop: thresholds has 1 tensors, expected 2",
    ),
    (
        lambda g: ops.grad_drop(g.grads, thresholds=[g.zeros(2, 3), g.zeros(5)]),
        ValueError,
        "grad_drop: thresholds 1 has shape [5], expected [4]",
    ),
    (
        lambda g: ops.grad_drop(g.grads, thresholds=[g.zeros(2, 3), None]),
        TypeError,
        "grad_drop: thresholds 1 is a NoneType, expected a Tensor",
    ),
    (
        lambda g: ops.grad_drop(g.grads, uniform=g.zeros(10).double()),
        TypeError,
        "grad_drop: uniform 0 has dtype torch.float64, expected torch.float32",
    ),
    (
        lambda g: ops.grad_drop(g.grads, uniform=g.zeros(10).to("meta")),
        ValueError,
        "grad_drop: uniform 0 is on meta, expected {device} as the gradients",
    ),
    (lambda g: ops.grad_drop(g.grads, leak=g.zeros(2)), ValueError, "grad_drop: leak has shape [2], expected [3]"),
    (
        lambda g: ops.grad_drop(g.grads, round_each=True),
        ValueError,
        "grad_drop: round_each is True and uniform is None, expected the random numbers",
    ),
    (
        lambda g: ops.sign_purity(g.halves, round_each=True),
        TypeError,
        "sign_purity: round_each is True for torch.float16 gradients, expected float32 or float64",
    ),
    (lambda g: ops.scale_(g.grads, g.zeros(2)), ValueError, "scale_: factors has shape [2], expected [3]"),
    (lambda g: ops.scale_(g.grads, g.zeros(1, 3)), ValueError, "scale_: factors has shape [1, 3], expected [3]"),
    (lambda g: ops.advance_(g.weights, g.state, *g.two), TypeError, "advance_: grads is a Tensor, " + MAKES),
    (lambda g: ops.advance_(g.grads, g.weights, *g.two), TypeError, "advance_: state is a Tensor, " + MAKES),
    (
        lambda g: ops.advance_(g.grads, g.state, g.weights, g.zeros(2)),
        ValueError,
        "advance_: take has shape [2], expected [3]",
    ),
    (
        lambda g: ops.advance_(g.grads, g.state, *g.two, of_grads=[1, 1, 1]),
        TypeError,
        "advance_: of_grads is a list, expected a Tensor of shape [3]",
    ),
    (
        lambda g: ops.advance_(g.grads, g.halves, *g.two),
        ValueError,
        "advance_: state has 1 tasks x 1 tensors, expected 3 x 2",
    ),
    (
        lambda g: ops.advance_(g.grads, TaskGradients.from_rows([[g.zeros(3, 2), None]] * 3), *g.two),
        ValueError,
        "advance_: state of tensor 0 has shape [3, 2], expected [2, 3]",
    ),
    (
        lambda g: ops.advance_(g.grads, TaskGradients.from_rows([[g.zeros(3, 2).T, None]] * 3), *g.two),
        ValueError,
        "advance_: state of tensor 0 has strides [1, 2], expected [3, 1]",
    ),
    (
        lambda g: ops.advance_(g.grads, TaskGradients.from_rows([[None, g.zeros(4)]] * 3), *g.two),
        ValueError,
        "advance_: task 0's entry of state for tensor 1 shares memory with task 1's state of tensor 1, expected memory "
        "of its own",
    ),
    (
        lambda g: ops.advance_(g.grads, g.grads, *g.two),
        ValueError,
        "advance_: task 0's entry of state for tensor 0 shares memory with task 0's gradient of tensor 0, expected "
        "memory of its own",
    ),
    (
        lambda g: ops.advance_(g.grads, g.state, *g.two, out=[g.zeros(2, 3), g.state.rows[1][1]]),
        ValueError,
        "advance_: task 1's entry of state for tensor 1 shares memory with out 1, expected memory of its own",
    ),
    (
        lambda g: ops.advance_(g.grads, g.state, *g.two, out=[g.zeros(2, 3)]),
        ValueError,
        "advance_: out has 1 tensors, expected 2",
    ),
    (lambda g: ops.excess_risks(g.grads, [g.weights]), TypeError, "excess_risks: sums is a list, " + MAKES),
    (
        lambda g: ops.excess_risks(g.grads, TaskGradients.from_rows([[None, g.zeros(5)]] * 3)),
        ValueError,
        "excess_risks: sums of tensor 1 has shape [5], expected [4]",
    ),
    (
        lambda g: ops.excess_risks(g.grads, g.state, 0.0),
        ValueError,
        "excess_risks: eps is 0.0, expected a positive number",
    ),
    (
        lambda g: ops.excess_risks(g.grads, g.state, factors=g.zeros(2)),
        ValueError,
        "excess_risks: factors has shape [2], expected [3]",
    ),
    (
        lambda g: ops.flatten(g.grads, torch.int64),
        TypeError,
        "flatten: dtype is torch.int64, expected float32, float64, bfloat16 or float16",
    ),
    (lambda g: ops.unflatten(g.zeros(9), g.grads), ValueError, "unflatten: vector has shape [9], expected [10]"),
    (lambda g: ops.unflatten(g.zeros(2, 5), g.grads), ValueError, "unflatten: vector has shape [2, 5], expected [10]"),
    (lambda g: ops.project(g.grads, g.weights), TypeError, "project: order is torch.float32, expected an int64 Tensor"),
    (
        lambda g: ops.project(g.grads, g.zeros(3, 3, dtype=torch.int64)),
        ValueError,
        "project: order has shape [3, 3], expected [3, 2]",
    ),
    (
        lambda g: ops.gram(g.grads, groups=[0]),
        ValueError,
        "gram: groups has 1 entries, expected 2, one for each tensor",
    ),
    (
        lambda g: ops.gram(g.grads, groups=[0, 1], num_groups=1),
        ValueError,
        "gram: tensor 1 is in group 1, expected 0 to 0",
    ),
    (lambda g: ops.norms(g.grads, groups=[0, -1]), ValueError, "norms: tensor 1 is in group -1, expected 0 to 0"),
    (
        lambda g: combine_into(g, g.zeros(2, 3), g.zeros(4), groups=[0, 0]),
        ValueError,
        "combine: weights has shape [3], expected [G, 3] as groups are given",
    ),
    (
        lambda g: combine_into(g, g.zeros(2, 3), g.zeros(4), weights=g.zeros(2, 3), groups=[0, 2]),
        ValueError,
        "combine: tensor 1 is in group 2, expected 0 to 1 as weights has rows",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message[:60] for *_, message in CASES])
def test_one_sentence(call, error, message, given):
    with pytest.raises(error) as raised:
        call(given)
    assert str(raised.value) == message.format(device=given.grads.device)


def test_an_order_is_read_on_the_cpu_only():
    with pytest.raises(ValueError, match=r"^project: order row 1 is \[0, 0\], expected each task but 1 once$"):
        ops.project(Given("cpu").grads, torch.tensor([[1, 2], [0, 0], [0, 1]]))


def test_nothing_is_written_before_the_check(given):
    out = [given.zeros(2, 3) + 7, given.zeros(5)]
    with pytest.raises(ValueError):
        ops.combine(given.grads, given.weights, out=out)
    assert (out[0] == 7).all()
    with pytest.raises(ValueError):
        ops.scale_(given.grads, given.zeros(2))
    assert all((g == 1).all() for g in given.grads.flat())
    with pytest.raises(ValueError):
        ops.advance_(given.grads, given.state, *given.two, given.weights, out=[out[0], given.state.rows[2][1]])
    assert not any(entry.any() for entry in given.state.flat())
    assert (out[0] == 7).all()
