"""Methods with state for each parameter beside their twins, over dtypes, layouts, gaps and sequences of tasks."""

import copy
import pickle

import pytest
import torch
from cases import DTYPES, draw_rows
from stateful import METHODS, TASKS, losses
from torch import Tensor, nn

from mtlfast import TaskGradients
from mtlfast.aggregation._keeps_state import KeepsState

every_method = pytest.mark.parametrize("name", METHODS)
SHAPES = [(4, 5), (), (0,), (7,), (2, 3, 4, 5), (300,)]
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES)
STEPS = 4


def flat(direction: list[Tensor | None], shapes=SHAPES) -> Tensor:
    """A direction as one float64 vector, zeros for None."""
    parts = [torch.zeros(s) if x is None else x for x, s in zip(direction, shapes, strict=True)]
    return torch.cat([part.double().cpu().reshape(-1) for part in parts])


def whole_matrix(rows) -> Tensor:
    """The Jacobian [K, P] with zeros for None."""
    return torch.stack([flat(row) for row in rows])


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype, state_dtype: torch.dtype | None = None) -> None:
    eps = max(torch.finfo(d).eps for d in (dtype, state_dtype or dtype))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max(8 * eps, 1e-11) * float(theirs.abs().max()))


def dense_draw(dtype=torch.float32, layout="contiguous", missing=0.0, num_tasks=TASKS):
    """Rows of which each tensor is reached, so that the twin's matrix has the same columns at each step."""
    while True:
        rows = draw_rows(num_tasks, SHAPES, dtype, layout, missing)
        lines = [*rows, *zip(*rows, strict=True)]  # no task and no tensor is left out
        if all(any(g is not None for g in line) for line in lines):
            return rows


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_directions_are_the_twins(name, dtype, layout, missing):
    method, twin = METHODS[name].make(), METHODS[name].twin(TASKS, NUMEL)
    if dtype == torch.float16 and name.startswith("ExcessMTL"):
        method = METHODS[name].make(state_dtype=torch.float32)
    for step in range(STEPS):
        rows = dense_draw(dtype, layout, missing)
        direction = method(TaskGradients.from_rows(rows), losses=losses(step=step))
        close(flat(direction), twin.step(whole_matrix(rows), losses(step=step), range(TASKS)), dtype)
        assert all(x.stride() == next(r[t] for r in rows if r[t] is not None).stride() for t, x in enumerate(direction))


@every_method
def test_an_absent_task_keeps_its_state_and_a_new_one_gets_some(name):
    method, twin = METHODS[name].make(), METHODS[name].twin(TASKS, NUMEL)
    for step, tasks in enumerate([[0, 1], [1], [2, 0], [0, 1, 2], [1, 2], [0, 2, 1]]):
        rows = dense_draw(torch.float64, num_tasks=len(tasks))
        before = tensors_of(method)
        direction = method(TaskGradients.from_rows(rows), losses=losses(tasks, step), tasks=tasks)
        close(flat(direction), twin.step(whole_matrix(rows), losses(tasks, step), tasks), torch.float64)
        assert all(torch.equal(tensors_of(method)[key], x) for key, x in before.items() if of_absent(key, tasks))


def tensors_of(method: KeepsState) -> dict[str, Tensor]:
    """Copies of the tensors for each parameter, by their names in the state dict."""
    return {key: value.clone() for key, value in method.state_dict().items() if "." in key}


def of_absent(key: str, tasks) -> bool:
    what, task, _ = key.split(".")
    return what in ("mean", "squares") and int(task) not in tasks


def restricted(twin, columns: slice):
    """A twin of some columns, whose state is a view of the whole one's."""
    part = copy.copy(twin)
    for key, value in vars(twin).items():
        if isinstance(value, Tensor) and value.shape[-1:] == (NUMEL,):
            setattr(part, key, value[..., columns])
    return part


@every_method
def test_a_parameter_that_no_task_reaches_keeps_its_state_and_counts_in_no_product(name):
    method, twin = METHODS[name].make(), METHODS[name].twin(TASKS, NUMEL)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    reached = slice(0, 28)  # the first four tensors
    for step in range(4):
        rows = dense_draw(torch.float64)
        if step % 2:
            rows = [[*row[:4], None, None] for row in rows]
        before = tensors_of(method)
        direction = method(TaskGradients.from_rows(rows, parameters), losses=losses(step=step))
        if step % 2 == 0:
            wanted = twin.step(whole_matrix(rows), losses(step=step), range(TASKS))
            close(flat(direction), wanted, torch.float64)
            continue
        assert direction[4] is None
        part = restricted(twin, reached)
        wanted = part.step(whole_matrix(rows)[:, reached], losses(step=step), range(TASKS))
        close(flat(direction)[reached], wanted, torch.float64)
        for key, value in vars(part).items():
            if isinstance(value, Tensor) and value.shape[-1:] == (28,):
                getattr(twin, key)[..., reached] = value.clone()
            elif key != "mean":
                setattr(twin, key, value)
        assert all(torch.equal(tensors_of(method)[key], x) for key, x in before.items() if key[-1] in "45")


@every_method
def test_a_task_that_reaches_nothing_is_absent(name):
    one, other = METHODS[name].make(), METHODS[name].make()
    for step in range(3):
        rows = dense_draw(torch.float64)
        if step == 1:
            rows[1] = [None] * len(SHAPES)
            ours = one(TaskGradients.from_rows(rows), losses=losses(step=step))
            theirs = other(TaskGradients.from_rows(rows[::2]), losses=losses((0, 2), step), tasks=[0, 2])
        else:
            ours, theirs = (made(TaskGradients.from_rows(rows), losses=losses(step=step)) for made in (one, other))
        assert torch.equal(flat(ours), flat(theirs))
    assert METHODS[name].make()(TaskGradients.from_rows([[None, None]] * 3), losses=losses()) == [None, None]


@every_method
def test_the_state_is_kept_without_the_loss_scale(name):
    plain, scaled = METHODS[name].make(), METHODS[name].make()
    for step, scale in enumerate([1.0, 1024.0, torch.tensor(0.25), None, torch.tensor([2.0])]):
        rows = dense_draw(torch.float64)
        factor = 1.0 if scale is None else float(scale)
        wanted = flat(plain(TaskGradients.from_rows(rows), losses=losses(step=step)))
        rows = [[factor * g for g in row] for row in rows]
        ours = scaled(TaskGradients.from_rows(rows), losses=factor * losses(step=step), loss_scale=scale)
        torch.testing.assert_close(flat(ours), factor * wanted, rtol=1e-9, atol=1e-12)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[key], value, rtol=1e-9, atol=1e-12, equal_nan=True)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_state_may_have_another_dtype(name, dtype, state_dtype):
    method, twin = METHODS[name].make(state_dtype=state_dtype), METHODS[name].twin(TASKS, NUMEL)
    for step in range(STEPS):
        rows = dense_draw(dtype, "channels_last", missing=0.2)
        direction = method(TaskGradients.from_rows(rows), losses=losses(step=step))
        assert all(x.dtype == dtype for x in direction)
        wanted = twin.step(whole_matrix(rows), losses(step=step), range(TASKS))
        close(flat(direction), wanted, dtype, state_dtype)
    kept = [value for key, value in tensors_of(method).items() if key.startswith(("mean", "squares"))]
    assert {value.dtype for value in kept} == {state_dtype}
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in kept if value.dim() == 4)


def run(method: KeepsState, grads: list[TaskGradients], begin: int = 0) -> list[Tensor]:
    """The directions of some steps."""
    return [flat(method(x, losses=losses(step=begin + i)), SHAPES) for i, x in enumerate(grads)]


def some_grads(count: int, parameters=None, dtype=torch.float32) -> list[TaskGradients]:
    return [TaskGradients.from_rows(dense_draw(dtype), parameters) for _ in range(count)]


def with_parameters(known: bool, dtype=torch.float32):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES] if known else None


CONTINUED = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda method: pickle.loads(pickle.dumps(method)),
    "loaded": lambda method: loaded(method.state_dict(), type(method), method),
}


def loaded(state, kind, method):
    fresh = copy.deepcopy(method)
    fresh.reset()
    assert not tensors_of(fresh)
    fresh.load_state_dict(state)
    return fresh


@every_method
@pytest.mark.parametrize("how", CONTINUED)
@pytest.mark.parametrize("known", [(True, True), (True, False), (False, True), (False, False)])
def test_a_copy_goes_on_as_the_original(name, how, known):
    before, after = (with_parameters(x) for x in known)
    method = METHODS[name].make(state_dtype=torch.bfloat16)
    run(method, some_grads(2, before))
    again = CONTINUED[how](method)
    kept = tensors_of(again)
    rows = [x.rows for x in some_grads(2)]
    ours = run(again, [TaskGradients.from_rows(x, after) for x in rows])
    assert tensors_of(method).keys() == kept.keys()
    assert all(torch.equal(x, kept[key]) for key, x in tensors_of(method).items())  # they share no memory
    assert all(map(torch.equal, ours, run(method, [TaskGradients.from_rows(x, before) for x in rows])))


@every_method
def test_a_state_that_was_loaded_on_a_run_replaces_its_state(name):
    method, grads = METHODS[name].make(), some_grads(5, with_parameters(True))
    run(method, grads[:2])
    state = copy.deepcopy(method.state_dict())
    wanted = run(method, grads[2:4])
    run(method, grads[4:])
    method.load_state_dict(state)
    assert all(map(torch.equal, wanted, run(method, grads[2:4])))
    method.load_state_dict(METHODS[name].make().state_dict())
    assert not tensors_of(method)
    assert method.state is None


@every_method
def test_its_dtype_does_not_follow_the_module(name):
    method, grads = METHODS[name].make(), some_grads(4)
    twin = METHODS[name].make()
    run(method, grads[:2])
    run(twin, grads[:2])
    before = tensors_of(method)
    method.to(torch.float16).double().half()
    assert all(torch.equal(x, before[key]) and x.dtype == before[key].dtype for key, x in tensors_of(method).items())
    assert all(map(torch.equal, run(method, grads[2:]), run(twin, grads[2:])))
    assert all(value.is_meta for value in method.to("meta").state_dict().values() if value.is_floating_point())


@every_method
def test_a_step_that_is_not_finite_gives_nan_and_moves_nothing(name):
    method, grads = METHODS[name].make(), some_grads(3)
    run(method, grads[:2])
    for bad in (torch.inf, -torch.inf, torch.nan):
        for task in range(TASKS):
            before = {key: value.clone() for key, value in method.state_dict().items()}
            rows = [[g.clone() for g in row] for row in grads[2].rows]
            rows[task][3][5] = bad
            direction = method(TaskGradients.from_rows(rows), losses=losses())
            assert all(x.isnan().all() for x in direction)
            after = method.state_dict()
            assert after.keys() == before.keys()
            assert all(torch.equal(after[key].nan_to_num(7), x.nan_to_num(7)) for key, x in before.items())


@every_method
def test_evaluation_moves_nothing_and_gives_the_direction_of_a_step(name):
    method, grads = METHODS[name].make(), some_grads(4)
    method.eval()
    run(method, grads[:1])
    assert not tensors_of(method)
    assert method.state is None
    for grad in grads:
        method.eval()
        before = {key: value.clone() for key, value in method.state_dict().items()}
        (seen,) = run(method, [grad])
        assert all(torch.equal(x.nan_to_num(7), before[key].nan_to_num(7)) for key, x in method.state_dict().items())
        method.train()
        assert torch.equal(seen, *run(method, [grad]))


@every_method
def test_reset_forgets(name):
    method, grads = METHODS[name].make(), some_grads(2)
    first = run(method, grads)
    method.reset()
    assert list(method.state_dict()) == list(METHODS[name].make().state_dict())
    assert all(map(torch.equal, first, run(method, grads)))
    method.reset()
    method(torch.randn(3, 5), losses=losses())  # of another shape


@every_method
def test_a_task_that_the_mask_leaves_out_keeps_its_state_and_does_not_count(name):
    masked, absent = METHODS[name].make(), METHODS[name].make()
    for step in range(4):
        rows = dense_draw(torch.float64)
        out = 1 + step % 2
        rows[out] = [torch.zeros_like(g) for g in rows[out]]  # as a loss weight of zero makes them
        there = [task for task in range(TASKS) if task != out]
        grads = TaskGradients.from_rows(rows)
        mask = torch.tensor([task != out for task in range(TASKS)])
        state = masked.direction(grads, make_step(losses(step=step), mask))
        some = TaskGradients.from_rows([rows[task] for task in there])
        wanted = absent(some, losses=losses(there, step), tasks=there)
        torch.testing.assert_close(flat(state), flat(wanted), rtol=1e-9, atol=1e-12)
    for key, value in tensors_of(absent).items():
        torch.testing.assert_close(tensors_of(masked)[key], value, rtol=1e-9, atol=1e-12)


def make_step(values: Tensor, mask: Tensor):
    from mtlfast.aggregation import Step

    return Step(TASKS, values, mask=mask)


@every_method
def test_the_same_bits_under_every_schedule(name, schedules, device):
    torch.manual_seed(3)
    grads = [TaskGradients.from_matrix(torch.randn(TASKS, 30_000, device=device)) for _ in range(3)]
    results = []
    for _ in schedules:
        method = METHODS[name].make()
        results.append([method(x, losses=losses().to(device))[0] for x in grads] + list(tensors_of(method).values()))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@every_method
def test_another_order_of_the_tasks_gives_the_same_direction(name):
    one, other = METHODS[name].make(), METHODS[name].make()
    for step, order in enumerate([[2, 0, 1], [1, 2, 0], [2, 1, 0]]):
        rows = dense_draw(torch.float64)
        wanted = one(TaskGradients.from_rows(rows), losses=losses(step=step))
        mixed = TaskGradients.from_rows([rows[task] for task in order])
        ours = other(mixed, losses=losses(order, step), tasks=order)
        torch.testing.assert_close(flat(ours), flat(wanted), rtol=1e-9, atol=1e-12)
