"""The base classes of aggregators, and the update of each method on gradients that can be checked by hand."""

import copy

import pytest
import torch
from cases import draw, matrix
from elementwise import METHODS as ELEMENT_WISE
from methods import METHODS

from mtlfast import TaskGradients, aggregation, ops, reference
from mtlfast.aggregation import (
    CRMOGM,
    MGDA,
    PCD,
    Aggregator,
    CAGrad,
    Constant,
    GramAggregator,
    Krum,
    Mean,
    PCGrad,
    Random,
    Reads,
    RowsJacobian,
    Step,
    Sum,
)
from mtlfast.aggregation._solved import SolvedAggregator

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
def test_matrix_and_rows_agree(make, device):
    aggregator, grads = make(), draw(3, [(4, 5), (3,)], device=device)
    torch.manual_seed(1)
    rows = aggregator(grads)
    torch.manual_seed(1)
    vector = aggregator(ops.flatten(grads))
    assert torch.allclose(torch.cat([x.flatten() for x in rows]), vector, atol=1e-6)


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


def test_settings_are_checked_when_they_are_set_later():
    aggregator = CAGrad(0.5)
    aggregator.c = 2
    assert repr(aggregator) == "CAGrad(c=2, rescale=0, norm_eps=0.0)"
    with pytest.raises(ValueError, match="CAGrad: c is 'x', expected a number of at least 0"):
        aggregator.c = "x"
    assert aggregator.c == 2


def test_crmogm_smooths_its_aggregators_weights(device):
    mgda, smoothed = MGDA(), CRMOGM(MGDA(), alpha=0.75)
    first, second = gram_of(device=device), gram_of(device=device)
    one, two = mgda.weights(first), mgda.weights(second)
    assert torch.equal(smoothed.weights(first), one)
    assert torch.allclose(smoothed.weights(second), 0.75 * one + 0.25 * two)
    given = CRMOGM(MGDA(), alpha=0.75, initial_weights=torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(given.weights(first).cpu(), 0.25 * one.cpu() + torch.tensor([0.75, 0, 0]).double())
    assert smoothed.reads is Reads.EXACT_GRAM
    assert CRMOGM(Mean()).reads is Reads.NOTHING
    with pytest.raises(TypeError, match="CRMOGM: aggregator is a int, expected one with weights"):
        CRMOGM(3)


def test_random_weights_are_positive_and_sum_to_one(device):
    torch.manual_seed(3)
    weights = Random(torch.Generator(device).manual_seed(1)).weights(gram_of(2, device=device))
    assert (weights > 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones((), dtype=torch.float64, device=device))
    again = Random(torch.Generator(device).manual_seed(1)).weights(gram_of(2, device=device))
    assert torch.equal(weights, again)


def test_cagrad_by_hand(device):
    # Orthogonal gradients of length 1: w = 1/2 each, |g_w| = |g_0|, so each gets (1 + c) / 2.
    gram = torch.eye(2, dtype=torch.float64, device=device)
    half = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    for rescale, factor in ((0, 1.0), (1, 1 / 1.16), (2, 1 / 1.4)):
        assert torch.allclose(CAGrad(0.4, rescale).weights(gram), 1.4 * half * factor)


def test_pcd_by_hand(device):
    def weights(*rows: list[float], tau: float = 0.1) -> torch.Tensor:
        J = torch.tensor(rows, dtype=torch.float64, device=device)
        return PCD(tau=tau, eps=0.0).weights(J @ J.T, rtol=1e-14).cpu()

    # A task that gains more than its share demands nothing, and the update keeps the first task's length.
    assert torch.allclose(weights([3.0, 0], [1, 1]), torch.tensor([1.0, 0]).double(), atol=1e-12)
    # An orthogonal task gets its tenth: d = (1, 0.1), at the first task's length.
    assert torch.allclose(
        weights([2.0, 0], [0, 1]) @ torch.tensor([[2.0, 0], [0, 1]]).double(),
        torch.tensor([2, 0.2]).double() / 1.01**0.5,
    )
    # Two tasks that contradict each other: their demands are dropped.
    dropped = weights([1.0, 0], [0, 1], [0, -1])
    assert torch.allclose(dropped, torch.tensor([1.0, 0, 0]).double(), atol=1e-12)
    assert weights([0.0, 0], [0, 1]).tolist() == [0, 0]


def test_krum_by_hand(device):
    points = torch.tensor([[9.0, 9], [0, 1], [0, 0], [1.2, 0], [-3, -3]], dtype=torch.float64, device=device)
    gram = points @ points.T
    # Sums of the distances to the two nearest: 1 + 1.2 is the least; to the nearest alone the second would be as good.
    assert Krum(1).weights(gram).tolist() == [0, 0, 1, 0, 0]
    assert Krum(1, n_selected=3).weights(gram).tolist() == [0, 1 / 3, 1 / 3, 1 / 3, 0]


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
        weights, gram = make().weigh(RowsJacobian(draw(3, [(4,)])), Step(3))
        assert gram is None
        assert weights.shape == (3,)


def test_the_table_of_contents_has_every_method_once():
    listed = [method for methods in aggregation.FAMILIES.values() for method in methods]
    exported = [getattr(aggregation, name) for name in aggregation.__all__]
    concrete = {x for x in exported if isinstance(x, type) and issubclass(x, Aggregator)} - {Aggregator, GramAggregator}
    assert len(listed) == len(set(listed))
    assert set(listed) == concrete
    for method in listed:
        # `keeps`, the docstring and the buffer must agree about the state.
        assert bool(method.keeps) == ("State:" in method.__doc__), method
        made = next(row.make() for row in [*METHODS.values(), *ELEMENT_WISE.values()] if type(row.make()) is method)
        if isinstance(made, SolvedAggregator):
            assert bool(method.keeps) == (made.state_shape(5) != made.state_shape(6)), method
