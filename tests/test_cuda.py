"""What only a GPU can show: no host sync, capture, streams, devices, memory, many launches, 2^31 elements."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import DTYPES, draw, draw_rows, matrix
from methods import METHODS, losses, numbers_of_tasks, products
from test_advance import assert_advanced, coefficients
from test_combine import assert_close, weights_of
from test_cross_gram import assert_cross_gram_is_exact
from test_excess_risks import assert_risks
from test_gram import GROUPED, assert_gram_is_exact, assert_groups_are_exact, groups_of
from test_scale import assert_scaled, copy_of
from torch import Tensor, nn

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import GradDrop, PCGrad
from mtlfast.bench.workload import scattered

pytestmark = [pytest.mark.cuda, pytest.mark.native]
MT = torch.ops.mtlfast
GIB, MIB = 2**30, 2**20


class Net(nn.Module):
    """A trunk and three heads that pull it in different directions."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))

    def losses(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        first, second, third = (head(features) for head in self.heads)
        return [first.square().mean(), -first.mean() + second.mean(), third.sum()]


def everything(grads: TaskGradients) -> list[Tensor]:
    """What each op makes of the gradients."""
    K = grads.num_tasks
    weights = torch.linspace(-1, 1, K, dtype=torch.float64, device=grads.device)
    order = torch.stack([torch.arange(1, K, device=grads.device).add(i).remainder(K) for i in range(K)])
    gram = ops.gram(grads)
    scaled = ops.scale_(copy_of(grads), weights)
    cross = ops.gram(grads, other=TaskGradients.from_rows(grads.rows[1:]))
    results = [gram, cross, ops.norms(grads), ops.solve(gram, "pcgrad", [0.0, 0.0]), ops.flatten(grads)]
    groups = [t % 2 for t in range(len(grads.shapes))]
    results += [ops.gram(grads, groups=groups), ops.norms(grads, groups=groups)]
    results += ops.combine(grads, torch.stack([weights, -weights]), groups=groups)
    state = copy_of(grads)
    results += [*ops.advance_(grads, state, weights, weights, weights, weights), *state.flat()]
    results += [ops.excess_risks(grads, copy_of(grads), factors=weights)]
    results += [*ops.combine(grads, weights), *ops.combine(grads, torch.stack([weights, weights]), dtype=torch.float64)]
    seed = torch.tensor([2**40 + 1], device=grads.device)
    results += [*ops.grad_drop(grads, seed), *ops.sign_purity(grads), *ops.trimmed_mean(grads, (K - 1) // 2)]
    return [*results, *scaled.flat(), *ops.project(grads, order).flat()]


def assert_same_bits(results: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, wanted, strict=True))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """torch's own calls that wait for the GPU raise."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("groups", [None, "tensor"])
def test_backward_never_waits_for_the_gpu(groups):
    net, x, aggregator = Net().cuda(), torch.randn(5, 16, device="cuda"), PCGrad()

    def two_steps() -> None:  # into no .grad, then into one
        net.zero_grad()
        for _ in range(2):
            step = mtlfast.backward(
                net.losses(x), aggregator, shared=net.trunk.parameters(), diagnostics=True, groups=groups
            )
            for result in (step, *step.by_group.values()):
                assert all(found is not None for found in (result.cosines, result.alignment))

    two_steps()
    with waiting_is_an_error():
        two_steps()
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", METHODS)
def test_weights_never_wait_for_the_gpu(name):
    method = METHODS[name]
    (num_tasks,) = numbers_of_tasks(method, 4)
    aggregator = method.make().to("cuda")
    gram = products(method, torch.randn(num_tasks, 9, dtype=torch.float64, device="cuda"))
    of_tasks = losses(num_tasks, "cuda")
    aggregator.weights(gram, losses=of_tasks)
    with waiting_is_an_error():
        weights = aggregator.weights(gram, losses=of_tasks)
    assert weights.isfinite().all()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("num_tasks", [3, 20])
def test_ops_never_wait_for_the_gpu(num_tasks):
    grads = draw(num_tasks, [(7,), (3000, 40), (130,)], device="cuda")
    wanted = everything(grads)
    with waiting_is_an_error():
        results = everything(grads)
    assert_same_bits(results, wanted)


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `run`, warmed up on a side stream, and what `run` returned in it: tensors that a replay rewrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [3, 20])
def test_a_captured_surgery_works_on_new_data(num_tasks, dtype):
    shapes = [(300, 5), (70_001,), *[(3,)] * 1500]  # more than one launch
    grads = draw(num_tasks, shapes, dtype, missing=0.1, device="cuda")
    given = [None if x is None else torch.empty_like(x) for x in grads.examples()]

    def surgery() -> list[Tensor]:
        keys = torch.rand(num_tasks, num_tasks, dtype=torch.float64, device="cuda")
        gram = ops.gram(grads)
        weights = ops.solve(gram, "pcgrad", [0.0, 0.0], [keys])
        return [keys, gram, weights, *(x for x in ops.combine(grads, weights, out=given) if x is not None)]

    graph, static = capture(surgery)
    drawn = []
    for _ in range(2):
        for g in grads.flat():
            if g is not None:
                g.copy_(torch.randn_like(g))
        graph.replay()
        replayed = [x.clone() for x in static]
        keys, gram = replayed[0], ops.gram(grads)
        weights = ops.solve(gram, "pcgrad", [0.0, 0.0], [keys])
        assert_same_bits(replayed, [keys, gram, weights, *(x for x in ops.combine(grads, weights) if x is not None)])
        drawn.append(keys)
    assert not torch.equal(*drawn)  # every replay draws an order of its own


def test_a_captured_backward_works_on_new_data():
    net, x, aggregator = Net().cuda(), torch.randn(5, 16, device="cuda"), PCGrad(order="fixed")

    def step(net: Net) -> mtlfast.StepResult:
        net.zero_grad()
        return mtlfast.backward(net.losses(x), aggregator, shared=net.trunk.parameters())

    graph, static = capture(lambda: step(net))
    eager = copy.deepcopy(net)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        wanted = step(eager)
        # Matrix products may choose another algorithm in a capture.
        assert torch.allclose(static.gram, wanted.gram, rtol=1e-4, atol=1e-6)
        assert torch.allclose(static.weights, wanted.weights, rtol=1e-4, atol=1e-6)
        for p, q in zip(net.parameters(), eager.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_ops_run_on_the_current_stream():
    grads = draw(5, [(7,), (3000, 40), (130,)], device="cuda")
    values = [torch.randn_like(g) for g in grads.flat()]
    everything(grads)  # loads the kernels: loading one waits for the GPU
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # tens of ms: on another stream an op would read what was there before
        for g, value in zip(grads.flat(), values, strict=True):
            g.copy_(value)
        results = everything(grads)
    stream.synchronize()
    assert_same_bits(results, everything(grads))


def test_gradients_of_another_stream_are_kept_by_record_stream():
    # torch's rule: memory goes back to the stream that allocated it, whatever other streams still read.
    grads = draw(5, [(7,), (3000, 40), (130,)], device="cuda")
    wanted = everything(grads)  # loads the kernels: loading one waits for the GPU
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        rows = [[g.clone() for g in row] for row in grads.rows]
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda._sleep(100_000_000)  # tens of ms: the ops are still to come when the gradients are dropped
    results = everything(TaskGradients.from_rows(rows))
    [g.record_stream(torch.cuda.current_stream()) for row in rows for g in row]
    del rows
    with torch.cuda.stream(side):
        overwriting = [torch.full_like(g, torch.nan) for g in grads.flat()]
    assert_same_bits(results, wanted)
    assert all(g.isnan().all() for g in overwriting)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [3, 20])
def test_element_by_element_ops_give_the_bits_of_the_cpu(num_tasks, dtype):
    rows = draw_rows(num_tasks, [(300, 5), (70_001,), (3,), *[(1,)] * 500], dtype, missing=0.1)
    grads = TaskGradients.from_rows(rows)
    moved = TaskGradients.from_rows([[None if g is None else g.cuda() for g in row] for row in rows])
    seed = torch.tensor([-7])
    pairs = [
        (ops.grad_drop(moved, seed.cuda()), ops.grad_drop(grads, seed)),
        (ops.sign_purity(moved), ops.sign_purity(grads)),
        (ops.trimmed_mean(moved, 1), ops.trimmed_mean(grads, 1)),
    ]
    if dtype in (torch.float32, torch.float64):
        uniform = torch.rand(grads.numel(), dtype=dtype)
        given = {"leak": torch.rand(num_tasks, dtype=torch.float64), "round_each": True}
        on_gpu = ops.grad_drop(moved, uniform=uniform.cuda(), leak=given["leak"].cuda(), round_each=True)
        pairs.append((on_gpu, ops.grad_drop(grads, uniform=uniform, **given)))
    for result, wanted in pairs:
        assert_same_bits([x for x in result if x is not None], [x for x in wanted if x is not None])


def test_a_captured_draw_keeps_other_signs_at_every_replay():
    grads, aggregator = draw(3, [(70_001,), (5,)], device="cuda"), GradDrop()
    with waiting_is_an_error():
        aggregator(grads)
    graph, static = capture(lambda: list(aggregator(grads)))
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(static[0].clone())
    assert not torch.equal(*drawn)


def test_more_tasks_than_a_table_holds_are_refused():
    rows = [[torch.ones(3, device="cuda")]] * 4078
    weights, out = torch.ones(4078, device="cuda"), [torch.zeros(3, device="cuda")]
    assert ops.combine(TaskGradients.from_rows(rows[1:]), weights[1:])[0].tolist() == [4077] * 3
    with pytest.raises(ValueError, match="combine: got 4078 tasks, expected at most 4077 on a GPU"):
        ops.combine(TaskGradients.from_rows(rows), weights, out)
    assert out[0].tolist() == [0] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ops_on_the_second_gpu_while_the_first_is_current():
    rows = draw_rows(5, [(7,), (3000, 40), (130,)], device="cuda:0")
    elsewhere = TaskGradients.from_rows([[g.to("cuda:1") for g in row] for row in rows])
    with torch.cuda.device(0):
        results = everything(elsewhere)
        assert torch.cuda.current_device() == 0
    assert {x.device for x in results} == {torch.device("cuda:1")}
    assert_same_bits(results, everything(TaskGradients.from_rows(rows)))


@pytest.mark.parametrize(("here", "there"), [("cuda:0", "cpu"), ("cpu", "cuda:0")])
def test_two_devices_are_both_named(here, there):
    grads, away = draw(3, [(4,)], device=here), torch.ones(3, device=there)
    gram = torch.eye(3, dtype=torch.float64, device=here)
    order = torch.zeros(3, 2, dtype=torch.int64, device=there)
    calls = {
        "TaskGradients: task 1, tensor 0": lambda: TaskGradients.from_rows([[gram], [gram.to(there)]]),
        "gram: other": lambda: ops.gram(grads, other=draw(2, [(4,)], device=there)),
        "combine: weights": lambda: ops.combine(grads, away),
        "combine: out 0": lambda: ops.combine(grads, away.to(here), out=[torch.zeros(4, device=there)]),
        "scale_: factors": lambda: ops.scale_(grads, away),
        "advance_: keep": lambda: ops.advance_(grads, copy_of(grads), away, away),
        "excess_risks: factors": lambda: ops.excess_risks(grads, copy_of(grads), factors=away),
        "grad_drop: leak": lambda: ops.grad_drop(grads, leak=away),
        "grad_drop: seed": lambda: ops.grad_drop(grads, away[:1].long()),
        "project: order": lambda: ops.project(grads, order),
        "solve: an input": lambda: ops.solve(gram, "pcgrad", [0.0, 0.0], [gram.to(there)]),
    }
    for subject, call in calls.items():
        with pytest.raises(ValueError, match=f"^{subject} is on {there}, expected {here} as "):
            call()
    with pytest.raises(ValueError, match=rf"combine: weights have shape \[3\] on {there}, expected .* on {here}"):
        MT.combine(grads.flat(), 3, away, 1.0)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` asks the allocator for, beyond what is held; blocks may be larger than what was asked for."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@pytest.mark.parametrize("num_tasks", [8, 32])
def test_peak_beside_the_operands(num_tasks):
    P = 16_000_000
    grads, weights = scattered(num_tasks, P, device="cuda"), torch.ones(num_tasks, device="cuda")
    own, direction = list(grads.rows[0]), P * 4
    assert peak_bytes(lambda: ops.gram(grads)) < 2 * MIB  # partial sums
    half = num_tasks // 2
    batches = [TaskGradients.from_rows(rows) for rows in (grads.rows[:half], grads.rows[half:])]
    assert peak_bytes(lambda: ops.gram(*batches)) < 2 * MIB
    assert peak_bytes(lambda: ops.norms(grads)) < 2 * MIB
    assert peak_bytes(lambda: ops.combine(grads, weights, out=own)) < MIB
    groups = [t // 2 for t in range(len(own))]
    assert peak_bytes(lambda: ops.gram(grads, groups=groups)) < 5 * MIB  # [75, K, K], and as large partial sums
    assert peak_bytes(lambda: ops.combine(grads, weights.expand(75, -1), out=own, groups=groups)) < MIB
    state = copy_of(grads)
    assert peak_bytes(lambda: ops.advance_(grads, state, weights, weights, weights, out=own)) < MIB
    assert peak_bytes(lambda: ops.excess_risks(grads, state)) < 2 * MIB
    assert direction <= peak_bytes(lambda: ops.combine(grads, weights)) < direction + MIB
    seed = torch.tensor([1], device="cuda")
    assert peak_bytes(lambda: ops.grad_drop(grads, seed, out=own)) < MIB
    assert peak_bytes(lambda: ops.trimmed_mean(grads, 1, own)) < MIB
    assert direction // 2 <= peak_bytes(lambda: ops.combine(grads, weights, dtype=torch.half)) < direction // 2 + MIB


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [3, 20])
def test_two_thousand_tensors_take_several_launches(num_tasks, dtype):
    grads = draw(num_tasks, [(1 + 7 * t % 40,) for t in range(2000)], dtype, missing=0.1, device="cuda")
    assert_gram_is_exact(grads)
    assert_cross_gram_is_exact(*(TaskGradients.from_rows(rows) for rows in (grads.rows[:2], grads.rows[2:])))
    for how in GROUPED:
        groups = groups_of(how, 2000)
        assert_groups_are_exact(grads, groups, max(groups) + 1, "exact")
    for num_out in (None, 2):
        weights = weights_of(grads, num_out)
        assert_close(grads, ops.combine(grads, weights), weights)
    by_group = ops.combine(grads, weights, groups=[t % 2 for t in range(2000)])
    for group in range(2):
        some = TaskGradients.from_rows([row[group::2] for row in grads.rows])
        assert_close(some, by_group[group::2], weights[group])
    assert torch.equal(ops.flatten(grads).cpu(), matrix(grads).to(dtype))
    before, factors = copy_of(grads), weights_of(grads)
    assert_scaled(ops.scale_(grads, factors), before, factors)
    state = draw(num_tasks, [(1 + 7 * t % 40,) for t in range(2000)], torch.float32, missing=0.1, device="cuda")
    old, given = copy_of(state), coefficients(num_tasks, "cuda")
    assert_advanced(grads, old, given, False, state, ops.advance_(grads, state, **given))
    squares = TaskGradients.from_rows([[None if s is None else s * s for s in row] for row in state.rows])
    assert_risks(ops.excess_risks(grads, squares, factors=factors), grads, squares, factors=factors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 6, 8, 17, 64, 100])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_gram_agrees_with_its_slow_kernel(precision, num_tasks, dtype):
    grads = draw(num_tasks, [(70_001,), (33, 65), (7,)], dtype, missing=0.1, device="cuda")
    slow = grads.run(lambda C, table: C.gram_plain(table), lambda ops: None).cpu()
    J = matrix(grads)
    sizes = J.abs() @ J.abs().T
    assert ((slow - J @ J.T).abs() <= sizes * 1e-13).all()
    error = (ops.gram(grads, precision=precision).cpu() - slow).abs()
    allowed = sizes * (1e-13 if precision == "exact" or dtype == torch.float64 else 1e-6)
    assert (error <= allowed).all()
    for split in {1, num_tasks // 2, num_tasks - 1} - {0, num_tasks}:
        batches = [TaskGradients.from_rows(rows) for rows in (grads.rows[:split], grads.rows[split:])]
        error = (ops.gram(*batches, precision=precision).cpu() - slow[:split, split:]).abs()
        assert (error <= allowed[:split, split:]).all()


def test_more_than_2_to_the_31_elements():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 16 * GIB:
        pytest.skip("needs 16 GiB of free GPU memory")
    P = 2**31 + 12_345
    marks = {0: 3.0, 2**31 - 1: -2.0, 2**31: 4.0, 2**31 + 7: 5.0, P - 1: 7.0}
    a, b = (torch.full((P,), value, dtype=torch.bfloat16, device="cuda") for value in (0.5, 1.0))
    for at, value in marks.items():
        a[at] = value
    grads = TaskGradients.from_rows([[a], [b]])
    # Small multiples of 1/4: all sums are exact, so an element left out or met twice shows.
    others = P - len(marks)
    aa, ab = others * 0.25 + sum(v * v for v in marks.values()), others * 0.5 + sum(marks.values())
    assert ops.gram(grads).tolist() == [[aa, ab], [ab, P]]

    out = torch.full((P,), torch.nan, dtype=torch.bfloat16, device="cuda")
    ops.combine(grads, torch.tensor([2.0, -1.0], device="cuda"), out=[out])  # 0 but for the marks
    assert [out[at].item() for at in marks] == [2 * value - 1 for value in marks.values()]
    assert int(out.count_nonzero()) == len(marks)
