"""The protocol, and the first aggregators."""

import copy

import pytest
import torch
from cases import draw, matrix

from mtlfast import TaskGradients, ops, reference
from mtlfast.aggregation import Aggregator, Constant, GramAggregator, Mean, PCGrad, Sum

MAKERS = {
    "Sum": Sum,
    "Mean": Mean,
    "Constant": lambda: Constant(torch.tensor([0.5, 2.0, -1.0])),
    "PCGrad": PCGrad,
    "PCGrad, mean, fixed": lambda: PCGrad(reduction="mean", order="fixed"),
}
every_aggregator = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def gram_of(*lead: int, num_tasks: int = 3, device: str = "cpu") -> torch.Tensor:
    J = torch.randn(*lead, num_tasks, 5, dtype=torch.float64, device=device)
    return J @ J.mT


@pytest.mark.parametrize(
    ("make", "expected"),
    [(Sum, [1.0, 1, 1]), (Mean, [1 / 3] * 3), (MAKERS["Constant"], [0.5, 2, -1])],
    ids=["Sum", "Mean", "Constant"],
)
def test_fixed_weights(make, expected, device):
    grads = draw(3, [(4, 5), (3,)], device=device)
    weights = make().weights(gram_of(device=device))
    assert weights.dtype == torch.float64
    assert torch.allclose(weights.cpu(), torch.tensor(expected, dtype=torch.float64))
    direction = make()(grads)
    exact = reference.combine(grads, weights)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(direction, exact, strict=True))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
def test_pcgrad_is_the_papers_algorithm_on_the_same_orders(num_tasks, device):
    J = matrix(draw(num_tasks, [(3, 2), (1,)], torch.float64))
    on_device = J.to(device)
    fixed = PCGrad(order="fixed")(on_device)
    assert torch.allclose(fixed.cpu(), reference.pcgrad(J).sum(0))
    seen = set()
    for seed in range(30):
        once, again = (torch.Generator(device).manual_seed(seed) for _ in range(2))
        keys = torch.rand(num_tasks, num_tasks, dtype=torch.float64, device=device, generator=once).cpu()
        order = keys.fill_diagonal_(2).argsort(dim=1)[:, : num_tasks - 1]
        seen.add(tuple(order.flatten().tolist()))
        direction = PCGrad(generator=again)(on_device)
        assert torch.allclose(direction.cpu(), reference.pcgrad(J, order).sum(0))
    assert num_tasks < 3 or len(seen) > 5


def test_pcgrad_mean_divides_by_the_present_tasks(device):
    gram = gram_of(num_tasks=4, device=device)
    both = [PCGrad(reduction=r, order="fixed").weights(gram) for r in ("sum", "mean")]
    assert torch.allclose(both[0] / 4, both[1])


@every_aggregator
def test_matrix_groups_and_rows_agree(make, device):
    aggregator, grads = make(), draw(3, [(4, 5), (3,)], device=device)
    torch.manual_seed(1)
    rows = aggregator(grads)
    torch.manual_seed(1)
    vector = aggregator(ops.flatten(grads))
    assert torch.allclose(torch.cat([x.flatten() for x in rows]), vector, atol=1e-6)
    if isinstance(aggregator, PCGrad) and aggregator.order == "random":
        aggregator.order = "fixed"
    gram = gram_of(2, 4, device=device)
    grouped = aggregator.weights(gram)
    assert grouped.shape == (2, 4, 3)
    assert torch.allclose(grouped[1, 2], aggregator.weights(gram[1, 2]))


@every_aggregator
def test_scale_free(make, device):
    gram = gram_of(device=device)
    aggregators = [make(), make()]
    weights = []
    for aggregator, scale in zip(aggregators, (1.0, 2.0**32), strict=True):
        torch.manual_seed(3)
        weights.append(aggregator.weights(gram * scale))
    assert torch.equal(*weights)


@every_aggregator
def test_not_finite_in_not_finite_out(make, device):
    grads = draw(3, [(4, 5), (3,)], device=device)
    grads.rows[1][1][0] = torch.nan
    _, direction = make()(grads)
    assert not direction[0].isfinite()


def test_one_call_of_weights_advances_the_order_once(device):
    gram = gram_of(2, device=device)
    once, generator = (torch.Generator(device).manual_seed(5) for _ in range(2))
    PCGrad(generator=generator).weights(gram)
    torch.rand(2, 3, 3, dtype=torch.float64, device=device, generator=once)
    assert torch.equal(generator.get_state(), once.get_state())
    PCGrad(order="fixed", generator=generator).weights(gram)
    assert torch.equal(generator.get_state(), once.get_state())


def test_state_dict_holds_the_generator_and_the_weights(device):
    gram = gram_of(num_tasks=6, device=device)
    a = PCGrad(generator=torch.Generator(device).manual_seed(1))
    a.weights(gram)
    saved = copy.deepcopy(a.state_dict())
    wanted = [a.weights(gram) for _ in range(3)]
    b = PCGrad(generator=torch.Generator(device))
    b.load_state_dict(saved)
    assert all(torch.equal(b.weights(gram), w) for w in wanted)
    c = Constant(torch.ones(3)).to(device)
    c.load_state_dict(MAKERS["Constant"]().state_dict())
    assert c.task_weights.tolist() == [0.5, 2.0, -1.0]


def test_state_stays_float64_when_a_model_changes_dtype():
    constant = Constant(torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    model = torch.nn.ModuleList([constant, torch.nn.Linear(2, 2)]).half().bfloat16().to(torch.float32)
    assert constant.task_weights.dtype == torch.float64
    assert constant.task_weights[0].item() == 1 / 3
    assert model[1].weight.dtype == torch.float32


def test_constant_with_absent_tasks(device):
    constant = Constant(torch.tensor([1.0, 2.0, 3.0]))
    assert constant.weights(gram_of(num_tasks=2, device=device), tasks=(0, 2)).tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"Constant: got tasks \[0, 1\], expected 3 tasks as there are weights"):
        constant.weights(gram_of(num_tasks=2))
    with pytest.raises(ValueError, match=r"Constant: got tasks \[0, 5\], expected 3 tasks"):
        constant.weights(gram_of(num_tasks=2), tasks=(0, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PCGrad(reduction="max"), "PCGrad: reduction is 'max', expected 'sum' or 'mean'"),
        (lambda: PCGrad(order="up"), "PCGrad: order is 'up', expected 'random' or 'fixed'"),
        (lambda: Constant(torch.ones(2, 2)), r"Constant: weights have shape \[2, 2\], expected \[K\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_gram_aggregators_have_weights(device):
    class Largest(Aggregator):
        def aggregate(self, grads: TaskGradients, **context):
            return list(grads.rows[int(ops.norms(grads).argmax())])

    largest = Largest()
    assert not hasattr(largest, "weights")
    assert not isinstance(largest, GramAggregator)
    J = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    assert torch.equal(largest(J), J[1])
    assert repr(PCGrad()) == "PCGrad(reduction='sum', order='random')"


def test_fixed_weights_compute_no_gram():
    # Sum and Mean must not read the gradients for a Gram matrix that they do not need.
    for make in (Sum, Mean, MAKERS["Constant"]):
        weights, gram = make().weigh(draw(3, [(4,)]), losses=None, grad_scale=None, tasks=None)
        assert gram is None
        assert weights.shape == (3,)
