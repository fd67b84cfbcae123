"""The ops as torch knows them: schemas, fake kernels, tracing, and the same bits as the marshalled calls."""

import pytest
import torch
from cases import DTYPES, draw, draw_rows

from mtlfast import TaskGradients, ops

pytestmark = pytest.mark.native
MT = torch.ops.mtlfast
OPS = ["gram", "norms", "combine", "combine_", "flatten", "unflatten", "scale_", "advance_", "excess_risks", "solve"]
OPS += ["grad_drop", "grad_drop_", "trimmed_mean", "trimmed_mean_"]


def samples(dtype, device):
    grads = draw(3, [(5, 7), (), (130,), (0,)], dtype, missing=0.2, device=device)
    flat = grads.flat()
    weights, coefficients = torch.randn(3, device=device), torch.randn(2, 3, device=device)
    out = [weights.new_zeros(0) if x is None else x for x in ops.combine(grads, weights)]
    present = [(k, g) for k, row in enumerate(grads.rows) for g in row if g is not None]
    gram = ops.gram(grads)
    state = draw(3, [(5, 7), (), (130,), (0,)], torch.bfloat16, missing=0.2, device=device).flat()
    present_state = [weights.new_zeros(0) if x is None else x for x in state]
    forms = torch.randn(4, 3, device=device)
    seed = torch.tensor([5], device=device)
    numbers = [torch.empty(0, device=device) if x is None else x for x in ops.sign_purity(grads)]
    drops = [
        ("drawn", False, seed, [], [], weights.abs()),
        ("given", False, None, numbers, numbers, None),
        ("expected", False, None, [], [], None),
    ]
    return {
        "gram": [
            *((flat, 3, True), (flat, 3, False), (flat, 3, True, 1), (flat, 3, False, 2)),
            *((flat, 3, True, 0, [0, 1, 0, 1], 2), (flat, 3, True, 1, [3, 1, 0, 1], 4)),
        ],
        "norms": [(flat, 3), (flat, 3, [0, 1, 0, 1], 2)],
        "combine": [
            (flat, 3, weights, 0.5),
            (flat, 3, coefficients, 1.0),
            *((flat, 3, w, 1.0, to) for w in (weights, coefficients) for to in DTYPES),
            (flat, 3, coefficients, 1.0, None, [0, 1, 1, 0]),
        ],
        "combine_": [
            (flat, 3, weights, out, True, 0.5),
            (flat, 3, coefficients, out, True, 0.5, [0, 1, 1, 0]),
            *((flat, 3, weights, [x.to(to) for x in out], True, 0.5) for to in DTYPES),
        ],
        "flatten": [(flat, 3, dtype), (flat, 3, torch.float64)],
        "unflatten": [
            (torch.randn(9, device=device), [torch.randn(2, 3, device=device), torch.randn(3, device=device)]),
            (torch.randn(0, device=device), []),
        ],
        "grad_drop": [(flat, 3, *drop) for drop in [*drops, ("purity", False, None, [], [], None)]],
        "grad_drop_": [(flat, 3, *drop, out) for drop in drops],
        "trimmed_mean": [(flat, 3, 1)],
        "trimmed_mean_": [(flat, 3, 1, out)],
        "scale_": [([g for _, g in present], [k for k, _ in present], weights)],
        "advance_": [(flat, 3, present_state, x, x is forms, out) for x in (forms, forms / 0)],
        "excess_risks": [(flat, 3, [None if s is None else s * s for s in state], 1e-7, weights)],
        "solve": [
            (gram, "pcgrad", [0.0, 0.0], [torch.rand(3, 3, device=device)], None, None),
            (gram, "pcgrad_coefficients", [], [], None, None),
            (gram, "nash_mtl", [1.0, 1.0, 1e-6], [None, weights.exp()], gram.new_zeros(6), None),
        ],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(op, dtype, device):
    for args in samples(dtype, device)[op]:
        torch.library.opcheck(getattr(MT, op).default, args)


def surgery(rows, weights):
    grads = TaskGradients.from_rows(rows)
    gram = ops.gram(grads)
    w = ops.solve(gram, "pcgrad", [0.0, 0.0])
    scaled = ops.combine(grads, w + weights)
    state = TaskGradients.from_rows([[g.abs().bfloat16() for g in row] for row in rows])
    risks = ops.excess_risks(grads, state)
    advanced = ops.advance_(grads, state, w, weights, w, weights, square=True)
    others = [ops.combine(grads, torch.stack([w, w]), dtype=to) for to in (None, *DTYPES)]
    groups, coefficients = [1, 0, 1], torch.stack([w, weights])
    others.append(ops.combine(grads, coefficients, groups=groups))
    moved = (*advanced, *state.flat(), ops.gram(grads, groups=groups), ops.norms(grads, groups=groups))
    kept = ops.grad_drop(grads, torch.tensor([3], device=weights.device), thresholds=ops.sign_purity(grads))
    cross = ops.gram(grads, other=TaskGradients.from_rows(rows[1:]))
    sums = (gram, cross, ops.norms(grads), ops.flatten(grads), risks)
    elementwise = [*kept, *ops.trimmed_mean(grads, 1)]
    return *sums, *moved, *scaled, *(x for other in others for x in other), *elementwise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("num_tasks", [3, 5])  # the precision of gram: by K alone, and by P too
def test_traced_calls_give_the_bits_of_eager_ones(num_tasks, dtype, device):
    rows = draw_rows(num_tasks, [(5, 7), (130,), (9001,)], dtype, device=device)
    weights = torch.rand(num_tasks, dtype=torch.float64, device=device)
    eager = surgery(rows, weights)
    traced = torch.compile(surgery, backend="aot_eager", fullgraph=True)(rows, weights)
    assert len(eager) == len(traced)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_meta_tensors_have_shapes():
    grads = TaskGradients.from_rows([[torch.empty(3, 4, device="meta"), None] for _ in range(5)])
    assert ops.gram(grads).shape == (5, 5)
    assert ops.gram(grads).is_meta
    assert ops.gram(grads, other=TaskGradients.from_rows(grads.rows[:2])).shape == (5, 2)
    assert ops.gram(grads, groups=[0, 2]).shape == (3, 5, 5)
    assert ops.norms(grads, groups=[0, 2], num_groups=4).shape == (4, 5)
    assert ops.combine(grads, torch.empty(2, 5, device="meta"), groups=[1, 0])[0].shape == (3, 4)
    assert ops.flatten(grads).shape == (5, 12)
    x, none = ops.combine(grads, torch.empty(2, 5, device="meta"))
    assert none is None
    assert x.shape == (2, 3, 4)
    assert ops.combine(grads, torch.empty(5, device="meta"), dtype=torch.float16)[0].dtype == torch.float16
    assert ops.sign_purity(grads)[0].shape == ops.trimmed_mean(grads, 1)[0].shape == (3, 4)
    assert ops.grad_drop(grads, torch.empty(1, dtype=torch.int64, device="meta"))[1] is None


def test_direct_calls_that_do_not_fit(device):
    x, ones = torch.zeros(3, device=device), torch.ones(2, device=device)
    with pytest.raises(ValueError, match="got 3 rows for 2 tasks"):
        MT.gram([x, x, x], 2, True)
    with pytest.raises(ValueError, match="gram: task 1, tensor 0 is not dense or differs"):
        MT.gram([x, x.double()], 2, True)
    for split in (-1, 2):
        with pytest.raises(ValueError, match=f"gram: split is {split}, expected at least 0 and less than 2"):
            MT.gram([x, x], 2, True, split)
    for op, more in ((MT.gram, (2, True, 0)), (MT.norms, (2,))):
        with pytest.raises(ValueError, match="groups has 2 entries, expected 1"):
            op([x, x], *more, [0, 0], 1)
        for group in (-1, 3):
            with pytest.raises(ValueError, match=f"got a tensor of group {group}, expected 0 to 2"):
                op([x, x], *more, [group], 3)
    with pytest.raises(ValueError, match="combine: got a tensor of group 2, expected 0 to 1"):
        MT.combine([x, x], 2, ones.new_ones(2, 2), 1.0, None, [2])
    with pytest.raises(ValueError, match=r"combine: weights have shape \[2\], expected \[G, 2\] as groups are given"):
        MT.combine_([x, x], 2, ones, [x.clone()], False, 1.0, [0])
    with pytest.raises(ValueError, match=r"combine: weights have shape \[2\]"):
        MT.combine([x, x, x], 3, ones, 1.0)
    with pytest.raises(ValueError, match="combine: out has 0 tensors, expected 1"):
        MT.combine_([x], 1, ones[:1], [], False, 1.0)
    with pytest.raises(ValueError, match=r"combine: out 1 has .* dtype Double .* and dtype Half"):
        MT.combine_([x, x], 1, ones[:1], [x.half(), x.double()], False, 1.0)
    with pytest.raises(RuntimeError, match="dtype is Int, expected float32, float64, bfloat16 or float16"):
        MT.combine([x], 1, ones[:1], 1.0, torch.int32)
    with pytest.raises(ValueError, match="advance_: the state differs from the task gradients in tasks"):
        MT.advance_([x, x], 2, [ones, ones], ones.new_ones(4, 2), False, [x.clone()])
    with pytest.raises(ValueError, match=r"advance_: coefficients have shape \[2\] .* expected \[4, 2\]"):
        MT.advance_([x, x], 2, [x.clone(), x.clone()], ones, False, [x.clone()])
    with pytest.raises(ValueError, match="advance_: out has 0 tensors, expected 1"):
        MT.advance_([x, x], 2, [x.clone(), x.clone()], ones.new_ones(4, 2), False, [])
    with pytest.raises(ValueError, match="excess_risks: the sums differ from the task gradients in tasks"):
        MT.excess_risks([x, x], 2, [ones, ones], 1e-7, ones)
    with pytest.raises(ValueError, match=r"excess_risks: factors have shape \[1\]"):
        MT.excess_risks([x, x], 2, [x, x], 1e-7, ones[:1])
    with pytest.raises(
        ValueError, match="trimmed_mean: trim_number is 1 for 2 tasks, expected less than half of at most"
    ):
        MT.trimmed_mean([x, x], 2, 1)
    with pytest.raises(
        ValueError, match="trimmed_mean: trim_number is 1 for 65 tasks, expected less than half of at most"
    ):
        MT.trimmed_mean([x] * 65, 65, 1)
    with pytest.raises(ValueError, match="grad_drop: form is other, expected drawn, given, expected or purity"):
        MT.grad_drop([x], 1, "other", False, None, [], [], None)
    with pytest.raises(ValueError, match="grad_drop: expected a seed of one int64 number on"):
        MT.grad_drop([x], 1, "drawn", False, ones, [], [], None)
    with pytest.raises(ValueError, match="grad_drop: round_each is true for Half, expected float32 or float64"):
        MT.grad_drop([x.half()], 1, "purity", True, None, [], [], None)
    with pytest.raises(ValueError, match=r"grad_drop: leak has shape \[2\]"):
        MT.grad_drop([x], 1, "expected", False, None, [], [], ones)
    with pytest.raises(ValueError, match="grad_drop: uniform has 0 tensors, expected 1"):
        MT.grad_drop([x], 1, "given", False, None, [], [], None)
    with pytest.raises(ValueError, match="scale_: task index 2 of tensor 0 is not below 2"):
        MT.scale_([x], [2], ones)
