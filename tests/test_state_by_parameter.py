"""State for each parameter in training: parameters that are frozen, added or left out, checkpoints, and refusals."""

import copy

import pytest
import torch
from stateful import METHODS, TASKS, losses
from torch import Tensor, nn

import mtlfast
from mtlfast import TaskGradients
from mtlfast.aggregation import DBMTL, MoCo, PseudoMomentum
from mtlfast.aggregation._keeps_state import KeepsState
from mtlfast.weighting import Constant

every_method = pytest.mark.parametrize("name", METHODS)


class Net(nn.Module):
    """Three layers of one shape, of which a step may leave out some, and a head for each task."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4, sparse=sparse)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(TASKS))
        self.double()

    def losses(self, step: int, layers=(0, 1, 2)) -> list[Tensor]:
        x = self.table(torch.arange(5) + step % 4).tanh()
        for i in layers:
            x = x + self.layers[i](x).tanh()
        return [(head(x) - 3).square().mean() for head in self.heads]

    def step(self, method: KeepsState, step: int, shared, layers=(0, 1, 2)) -> Tensor:
        """One step of SGD. Returns all shared gradients."""
        self.zero_grad()
        mtlfast.backward(self.losses(step, layers), method, shared=shared)
        grads = [p.grad for p in self.parameters()]
        with torch.no_grad():
            for p in self.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
        return torch.cat([g.reshape(-1) for g in grads if g is not None])


def states_of(method: KeepsState, parameter: Tensor) -> dict:
    (column,) = [column for column in method.kept._columns if column.parameter is parameter]
    return {key: value.clone() for key, value in column.tensors.items()}


def assert_equal_states(one: dict, other: dict) -> None:
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@every_method
def test_a_frozen_parameter_keeps_its_state_and_goes_on_with_it(name):
    net, method = Net(), METHODS[name].make()
    frozen = net.layers[1].weight
    net.step(method, 0, net.layers)
    kept, others = states_of(method, frozen), states_of(method, net.layers[2].weight)
    frozen.requires_grad_(False)
    net.step(method, 1, net.layers)
    assert frozen.grad is None
    assert_equal_states(kept, states_of(method, frozen))
    assert any(not torch.equal(x, others[key]) for key, x in states_of(method, net.layers[2].weight).items())
    frozen.requires_grad_(True)
    net.step(method, 2, net.layers)
    assert any(not torch.equal(x, kept[key]) for key, x in states_of(method, frozen).items())
    assert len(method.kept._columns) == 3


@every_method
def test_an_unfrozen_parameter_gets_state_in_its_place(name):
    net, method = Net(), METHODS[name].make()
    net.layers[0].weight.requires_grad_(False)
    net.step(method, 0, net.layers)
    kept = states_of(method, net.layers[1].weight)
    net.layers[0].weight.requires_grad_(True)
    net.step(method, 1, net.layers)
    assert states_of(method, net.layers[0].weight).keys() == kept.keys()
    assert states_of(method, net.layers[1].weight).keys() == kept.keys()
    assert [column.parameter for column in method.kept._columns] == [layer.weight for layer in net.layers]


@every_method
def test_the_state_follows_its_parameter_in_another_order_of_shared(name):
    nets, methods = [Net(), Net()], [METHODS[name].make(), METHODS[name].make()]
    for step in range(3):
        orders = [list(net.layers) for net in nets]
        if step == 1:
            orders[1].reverse()
        grads = [net.step(method, step, order) for net, method, order in zip(nets, methods, orders, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@every_method
@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
@pytest.mark.parametrize("unfrozen_at", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_though_a_parameter_was_frozen(name, frozen, unfrozen_at):
    net, method = Net(), METHODS[name].make()
    net.step(method, 0, net.layers)
    if frozen is not None:
        net.layers[frozen].weight.requires_grad_(False)
    net.step(method, 1, net.layers)
    saved = copy.deepcopy([net.state_dict(), method.state_dict()])
    again, loaded = Net(), METHODS[name].make()
    if frozen is not None:
        again.layers[frozen].weight.requires_grad_(False)
    again.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    for step in (2, 3, 4):
        if step == unfrozen_at:
            net.requires_grad_(True)
            again.requires_grad_(True)
        assert torch.equal(net.step(method, step, net.layers), again.step(loaded, step, again.layers))


def test_a_step_that_leaves_a_layer_out_keeps_its_state():
    net, method = Net(), MoCo()
    net.step(method, 0, net.layers)
    kept = states_of(method, net.layers[1].weight)
    net.step(method, 1, net.layers, layers=(0, 2))
    assert_equal_states(kept, states_of(method, net.layers[1].weight))
    net.step(method, 2, net.layers)


REFUSED = {
    "other shapes": ([(2,), (3,)], [(2,), (4,)], "tensor 1 has shape [4], expected [3] as its state has"),
    "fewer": ([(2,), (3,)], [(2,)], "got 1 tensors, expected 2 as there is state for"),
    "more": ([(2,)], [(2,), (3,)], "got 2 tensors, expected 1 as there is state for"),
}


@every_method
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("known", [False, True])
def test_what_does_not_fit_the_state_is_refused_and_nothing_moves(name, case, known):
    before, after, sentence = REFUSED[case]
    method = METHODS[name].make()
    method(TaskGradients.from_rows([[torch.randn(s) for s in before] for _ in range(TASKS)]), losses=losses())
    state = copy.deepcopy(method.state_dict())
    again = METHODS[name].make()
    again.load_state_dict(state)
    parameters = [nn.Parameter(torch.zeros(s)) for s in after] if known else None
    rows = TaskGradients.from_rows([[torch.randn(s) for s in after] for _ in range(TASKS)], parameters)
    if known:
        sentence = sentence.replace("tensors,", "parameters after loading,").replace("as there is", "as the")
        sentence = sentence.replace("state for", "state has")
    for made in (method, again):
        with pytest.raises(ValueError, match=f"{type(method).__name__}: ") as error:
            made(rows, losses=losses())
        assert sentence in str(error.value)
        assert made.state_dict().keys() == state.keys()
        assert all(torch.equal(x.nan_to_num(7), state[key].nan_to_num(7)) for key, x in made.state_dict().items())
        made.reset()
        made(rows, losses=losses())


@every_method
def test_features_and_sparse_gradients_are_refused_and_nothing_moves(name):
    net, method = Net(sparse=True), METHODS[name].make()
    features = net.table(torch.arange(5))
    kind = type(method).__name__
    with pytest.raises(TypeError, match=f"{kind}: keeps state for each parameter, but the features of at= are new"):
        mtlfast.backward([(h(features) - 1).square().mean() for h in net.heads], method, at=features)
    wanted = f"{kind}: keeps state for each parameter, but the gradient of table.weight is sparse"
    for _ in range(2):
        with pytest.raises(TypeError, match=wanted):
            mtlfast.backward(net.losses(0), method, shared=[*net.named_parameters()][:2])
    assert all(p.grad is None for p in net.parameters())
    assert method.state is None
    assert not method.kept._columns


@pytest.mark.parametrize("make", [MoCo, DBMTL])
def test_losses_are_asked_for(make):
    with pytest.raises(ValueError, match=f"{make.__name__}: losses is None, expected the tasks' losses"):
        make()(torch.randn(3, 4))


def test_a_task_beyond_the_number_is_refused():
    with pytest.raises(ValueError, match=r"got tasks \[0, 3\], expected indices below 3 as num_tasks says"):
        PseudoMomentum(3)(torch.randn(2, 4), tasks=[0, 3])


@pytest.mark.parametrize("value", [torch.int32, "float32", 3])
def test_what_is_no_dtype_for_state_is_refused(value):
    with pytest.raises(ValueError, match=r"MoCo: state_dtype is .*, expected None, torch.float32"):
        MoCo(state_dtype=value)


def test_the_state_is_scattered_like_the_gradients_and_no_larger():
    net, method = Net(), MoCo(state_dtype=torch.bfloat16)
    net.step(method, 0, net.layers)
    tensors = [x for column in method.kept._columns for x in column.tensors.values()]
    assert [x.numel() for x in tensors] == [16] * 3 * TASKS
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == 3 * TASKS
    assert all(x.untyped_storage().nbytes() == 2 * 16 for x in tensors)


@every_method
def test_the_direction_is_added_to_a_sparse_grad(name):
    """The gradient of an earlier pass was sparse, this step's are dense."""
    table = nn.Parameter(torch.randn(4, 3))
    directions = []
    for sparse in (False, True):
        table.grad = torch.ones(4, 3).to_sparse(1) if sparse else torch.ones(4, 3)
        step = [(k + 1) * table.square().sum() + (table[k] * k).sum() for k in range(TASKS)]
        mtlfast.backward(step, METHODS[name].make(), shared=[table])
        directions.append(table.grad.to_dense() if table.grad.is_sparse else table.grad)
    torch.testing.assert_close(directions[1], directions[0])


@pytest.mark.parametrize("name", ["MoCo", "DBMTL"])
def test_state_that_its_dtype_cannot_hold_does_not_move(name):
    w = nn.Parameter(torch.zeros(2))
    method = METHODS[name].make()
    method.state_dtype = torch.float16

    def step(factor):
        w.grad = None
        return mtlfast.backward([factor * (w[0] + 1), w[1] + 1], method, shared=[w])

    step(1.0)
    before = copy.deepcopy(method.state_dict())
    small = 1e-6 if name == "DBMTL" else 1e7  # the gradient of log L, and L g / |g|
    mtlfast.backward([small * (0 * w[0] + 1) + w[0], w[1] + 1], method, shared=[w])
    assert w.grad.isnan().any()
    assert all(torch.equal(x, before[key]) for key, x in method.state_dict().items())
    step(1.0)
    assert w.grad.isfinite().all()


@every_method
def test_state_that_inference_mode_made_moves_later(name):
    rows = [[torch.randn(3)] for _ in range(TASKS)]
    method = METHODS[name].make()
    with torch.inference_mode():
        method(TaskGradients.from_rows(rows), losses=losses())
    (direction,) = method(TaskGradients.from_rows(rows), losses=losses())
    assert direction.isfinite().all()


def test_momentum_stays_where_all_loss_weights_are_zero():
    w = nn.Parameter(torch.randn(3))
    method = PseudoMomentum(2)
    step = [w.square().sum(), w.sum()]
    mtlfast.backward(step, method, shared=[w])
    before = copy.deepcopy(method.state_dict())
    w.grad = None
    mtlfast.backward([w.square().sum(), w.sum()], method, shared=[w], weighting=Constant([0.0, 0.0]))
    assert torch.equal(w.grad, torch.zeros(3))
    assert all(torch.equal(x, before[key]) for key, x in method.state_dict().items())


def test_momentum_of_float16_gradients_keeps_small_directions():
    torch.manual_seed(0)
    wide, scale = torch.randn(2, 64, dtype=torch.float64), 1024.0
    rows = (1e-7 * wide * scale).half()
    wanted = PseudoMomentum(2)(rows.double() / scale)
    (given,) = PseudoMomentum(2, state_dtype=torch.float32)(TaskGradients.from_matrix(rows), loss_scale=scale)
    torch.testing.assert_close(given.double() / scale, wanted, rtol=2e-3, atol=1e-5)


def test_methods_see_weighted_losses():
    w, directions = nn.Parameter(torch.ones(2)), []
    for factor, weighting in ((1, Constant([10.0, 10.0])), (10, None)):
        w.grad = None
        step = [factor * w[0], factor * w[1].square()]
        mtlfast.backward(step, DBMTL(), shared=[w], weighting=weighting)
        directions.append(w.grad)
    torch.testing.assert_close(*directions)
